"""The command service: `serve` as a launchd agent, installed with `serve`'s options.

They are checked at once, not only at the next login. Does not know launchd (`launchd`).
"""

import platform
import shlex
from collections.abc import Iterator
from os import environ
from pathlib import Path

import click
from click.core import ParameterSource

from magistral_mlx.errors import ServerError
from magistral_mlx.fetch import hub

from . import launchd
from .common import chosen, resolve
from .serve import check, serve


@click.group()
def service() -> None:
    """Keep `serve` running on a Mac, from login on."""


@service.command(context_settings={"ignore_unknown_options": True})
@click.option("--force", is_flag=True, help="Replace the agent that is installed.")
@click.option("--print", "printed", is_flag=True, help="Show what would be installed, and do nothing.")
@click.argument("serve_options", nargs=-1, type=click.UNPROCESSED)
def install(*, force: bool, printed: bool, serve_options: tuple[str, ...]) -> None:
    """Install and start the agent.

    It runs `magistral-mlx serve` with SERVE_OPTIONS, which may be any of its options but --api-key: put the
    key in a file, for --api-key-file.
    """
    content = launchd.agent(_arguments(serve_options), home=Path.home(), environment=environ)
    if printed:
        click.echo(content, nl=False)
        click.echo(
            f"as {launchd.file(Path.home())}, then: {shlex.join(launchd.bootstrap(Path.home()))}", err=True
        )
        return
    _only_on_a_mac()
    launchd.install(content, home=Path.home(), force=force)
    click.echo(f"started, now and at every login; its log: {launchd.log(Path.home())}")


@service.command()
def uninstall() -> None:
    """Stop the agent and remove it."""
    _only_on_a_mac()
    launchd.uninstall(home=Path.home())
    click.echo("stopped and removed")


@service.command()
def status() -> None:
    """Show whether the agent is installed and running."""
    _only_on_a_mac()
    state = launchd.status(home=Path.home())
    if state is None:
        start = shlex.join(launchd.bootstrap(Path.home()))
        raise ServerError(f"installed, but launchd does not have it; start it: {start}")
    click.echo(f"{state}; its log: {launchd.log(Path.home())}")


def _only_on_a_mac() -> None:
    if platform.system() != "Darwin":
        raise ServerError(
            "launchd is macOS's; on Linux use deploy/Dockerfile (`service install --print` shows the agent)"
        )


def _arguments(options: tuple[str, ...]) -> list[str]:
    """The arguments: `serve`, the model (a directory by its absolute path), its other options; checked."""
    with serve.make_context("magistral-mlx serve", [*options]) as context:
        if context.params["api_key"] is not None:
            raise ServerError(
                "a key in the agent's options could be read by others; put it in a file, for --api-key-file"
            )
        check(context.params)  # type: ignore[arg-type]
        name = chosen(context.params["model"])
        resolve(name, download=context.params["download"])
        directory = None if name == "demo" else hub.directory(name)
        return ["serve", "--model", str(directory.resolve()) if directory else name, *_other_options(context)]


def _other_options(context: click.Context) -> Iterator[str]:
    """The options that were given on the command line, except the model's."""
    for option in serve.params:
        name = option.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not given or name in ("model", "download"):
            continue
        value = context.params[name]
        for one in value if option.multiple else [value]:
            yield option.opts[0]
            yield str(one.resolve() if isinstance(one, Path) else one)
