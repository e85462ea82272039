"""What the commands share: a model's name made a place, Ctrl-C made two things, sizes made readable."""

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from magistral_mlx.errors import HubError
from magistral_mlx.fetch import hub

if TYPE_CHECKING:
    from magistral_mlx.talk.stream import Stream


def resolve(name: str, *, download: bool, then: hub.Needs | None = None) -> hub.Local:
    """Where a model lies; what is not here is downloaded if the user says so, now or by --download.

    then: what else will be written, so that there is room for both.
    """
    try:
        return hub.resolve(name, download=download, then=then)
    except HubError as error:
        if download or not sys.stdin.isatty() or not click.confirm(f"{error}\nDownload it now?"):
            raise
        return hub.resolve(name, download=True, then=then)


@contextmanager
def first_interrupt_stops_thinking(stream: "Stream") -> Generator[None]:
    """Ctrl-C while the model thinks asks it for the answer; during the answer, or again, it interrupts."""

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


def writable(file: Path) -> None:
    """Refuse a place where a result could not be written, before the work that it is the result of."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise click.BadParameter(f"{file} cannot be written: {error.strerror}; name another file") from error


def size(nbytes: float) -> str:
    """Decimal units, as disks and `ls` on a Mac count."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} bytes"
