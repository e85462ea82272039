"""`magistral-mlx`: the group of all commands, and how their mistakes are told.

Whatever a command does, the library does it; nothing is decided here but what a person is asked and shown.
"""

import warnings
from typing import Any

import click

from magistral_mlx.errors import MagistralError, MagistralWarning

from . import ask, bench, convert, doctor, plan, serve, service


class _Group(click.Group):
    """A user's mistake ends in one line and exit code 1, never in a traceback; commands in our order."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        return [*self.commands]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MagistralError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="magistral_mlx", prog_name="magistral-mlx")
def cli() -> None:
    """Run Mistral's reasoning model Magistral Small on this machine."""
    warnings.showwarning = _show_warning


for _command in (
    *(ask.ask, ask.chat),
    *(serve.serve, convert.convert, convert.verify, convert.info, plan.plan),
    *(bench.bench, doctor.doctor, service.service),
):
    cli.add_command(_command)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, MagistralWarning):
        click.echo(f"note: {message}", err=True)
