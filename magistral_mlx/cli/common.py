"""What the commands share: options, model names, user-named files, Ctrl-C, readable sizes."""

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from magistral_mlx.errors import HubError
from magistral_mlx.fetch import hub, last_model

if TYPE_CHECKING:
    from magistral_mlx.talk.stream import Stream

DTYPES = click.Choice(["bfloat16", "float16", "float32"])
model_option = click.option(
    "--model", "-m", help="A directory, a Hub name, or 'demo'. Default: the last one used."
)
download_option = click.option("--download", is_flag=True, help="Download the model if it is not here yet.")
dtype_option = click.option(
    "--dtype", type=DTYPES, help="Data type of the computation. Default: bfloat16 on a GPU, float32 on a CPU."
)
kv_bits_option = click.option(
    "--kv-bits", type=click.Choice(["16", "8"]), default="16", help="Bits of the KV cache; 8 halves its size."
)
quantize_after_option = click.option(
    "--quantize-after",
    type=click.IntRange(0),
    default=0,
    help="With --kv-bits 8: keep the KV cache in 16 bit up to this many tokens.",
)

NO_MODEL = "no model was given, and there is no last used one"


def chosen(name: str | None) -> str:
    """The model's name: the given one, or else the one used last."""
    found = last_model.last_used() if name is None else name
    if found is None:
        raise click.UsageError(f"{NO_MODEL}: give --model demo, or --model {hub.RECOMMENDED}")
    return found


def resolve(name: str, *, download: bool, then: hub.Needs | None = None) -> hub.Local:
    """Where a model is; if it is missing it is downloaded, given --download or the user's consent now.

    then: what else will be written, so that the disk has room for both.
    """
    try:
        return hub.resolve(name, download=download, then=then)
    except HubError as error:
        if download or not sys.stdin.isatty() or not click.confirm(f"{error}\nDownload it now?"):
            raise
        return hub.resolve(name, download=True, then=then)


def read_text(file: Path) -> str:
    """The text of a file that the user named."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{file} cannot be read as UTF-8 text: {error}") from error


def writable(file: Path) -> Path:
    """`file`, after checking that it can be written: before the work whose result it will hold."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        there = file.exists()
        file.open("a").close()
        if not there:
            file.unlink()
    except OSError as error:
        raise click.BadParameter(f"{file} cannot be written: {error.strerror}") from error
    return file


@contextmanager
def first_interrupt_stops_thinking(stream: "Stream") -> Generator[None]:
    """The first Ctrl-C during the reasoning ends it, and the answer follows; any other one interrupts."""

    def interrupted(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        if stream.phase != "thinking":
            raise KeyboardInterrupt
        stream.stop_thinking()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def size(nbytes: float) -> str:
    """A readable size in decimal units, as disks and macOS use them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} bytes"
