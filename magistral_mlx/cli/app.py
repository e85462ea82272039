"""`magistral-mlx`: the group of all commands, and how their errors are shown.

The library does the work; the commands only decide what the user is asked and shown.
"""

import errno
import os
import sys
import warnings
from typing import Any

import click

from magistral_mlx.errors import MagistralError, MagistralWarning

from . import ask, bench, convert, doctor, plan, serve, service


class _Group(click.Group):
    """Shows the library's errors, a full disk and Ctrl-C as one line, not a traceback. Keeps our order of
    commands.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        return [*self.commands]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MagistralError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = error.filename or "the output"
            raise click.ClickException(
                f"{where} cannot be written: the disk is full; make room, then run this again"
            ) from error
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="magistral_mlx", prog_name="magistral-mlx")
def cli() -> None:
    """Run Mistral's reasoning model Magistral Small on this machine."""
    _open_streams()
    warnings.showwarning = _show_warning


for _command in (
    *(ask.ask, ask.chat),
    *(serve.serve, convert.convert, convert.verify, convert.info, plan.plan),
    *(bench.bench, doctor.doctor, service.service),
):
    cli.add_command(_command)


def _open_streams() -> None:
    """Replace standard streams that the shell closed (`>&-`), which are None in Python, by /dev/null."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123 -- stays open


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, MagistralWarning):
        click.echo(f"note: {message}", err=True)
