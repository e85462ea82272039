"""A stream drawn in a terminal: reasoning dim, the answer plain, each where a pipe would want it.

On a terminal both go to standard output. Where that is a file or a pipe it gets the answer only, and the
reasoning goes to standard error. Knows events and terminals; not models.
"""

import sys
import textwrap
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from os import environ
from shutil import get_terminal_size
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from magistral_mlx.events import AnswerToken, Event, Finished, Stats, ThinkToken, ToolCallToken

from .wrapping import Lines

if TYPE_CHECKING:
    from .reply import Reply

_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
"""Characters by which a model's text could steer a terminal (move, recolour, write its clipboard)."""


class Terminal:
    """Standard output and standard error, as one reply after another is shown."""

    def __init__(self, *, show_thinking: bool = True) -> None:
        self.show_thinking = show_thinking
        self._lines = Lines()

    def show(self, events: Iterable[Event]) -> Finished | None:
        """Draw a reply as it comes; returns how it ended, or None when the stream was closed."""
        finished, thought, answered = None, False, False
        self._lines = Lines()
        with Console(stderr=True).status("thinking …") as status:
            try:
                for event in events:
                    match event:
                        case ThinkToken(text=text) if self.show_thinking:
                            status.stop()
                            thought = True
                            self._write(text, thinking=True)
                        case ThinkToken():
                            pass
                        case AnswerToken(text=text):
                            status.stop()
                            if thought and not answered:
                                self._write("\n\n", thinking=True)
                            answered = True
                            self._write(text)
                        case ToolCallToken(text=text, name=name):
                            status.stop()
                            self._write(f"\n{name} {text}" if name else text, thinking=True)
                        case Finished():
                            finished = event
            finally:
                self._write("\n", thinking=not answered)
        return finished

    def note(self, text: str) -> None:
        """A line about the work and not of it: to standard error, and only if someone is looking."""
        if sys.stderr.isatty():
            whole = " · ".join(part.replace(" ", "\xa0") for part in text.split(" · "))
            lines = textwrap.wrap(whole, get_terminal_size().columns - 1, break_long_words=False)
            click.secho("\n".join(lines).replace("\xa0", " "), dim=True, err=True)

    def _write(self, text: str, *, thinking: bool = False) -> None:
        """Text to where it belongs, at once; click leaves styles out where no terminal would show them."""
        is_terminal = sys.stdout.isatty()
        shown = text.translate(_CONTROLS) if is_terminal else text
        if is_terminal and environ.get("TERM") != "dumb":
            shown = self._lines.feed(shown, columns=get_terminal_size().columns)
        click.secho(shown, dim=thinking, nl=False, err=thinking and not is_terminal)


def complain(text: str) -> None:
    """What went wrong: to standard error, whoever looks."""
    click.echo(text, err=True)


def summary(finished: Finished) -> str:
    """One line of figures: where tokens and seconds went."""
    stats: Stats = finished.stats
    read = stats.prompt_tokens - stats.cached_tokens
    parts = [f"read {read} tokens in {stats.prefill_seconds:.1f} s"]
    if stats.thinking_tokens:
        cut = ", ended early" if stats.forced_tokens else ""
        parts.append(f"thought {stats.thinking_tokens} tokens for {stats.thinking_seconds:.1f} s{cut}")
    parts.append(f"answered {stats.answer_tokens} tokens in {stats.answer_seconds:.1f} s")
    parts.append(f"{stats.decode_tokens_per_second:.1f} tokens/s")
    if stats.tokens_per_pass > 1:
        parts.append(f"{stats.tokens_per_pass:.2f} tokens a forward pass")
    parts.append(f"{stats.peak_memory / 1e9:.2f} GB at most")
    return " · ".join(parts)


def shortcoming(reply: "Reply") -> str | None:
    """What a reply lacks, in a line that its reader should see; None: nothing."""
    match reply.finish_reason:
        case "length":
            return "cut off: max_tokens or the context was spent"
        case "loop":
            return "stopped: it went round in circles"
        case "stop" if not reply.answer and not reply.tool_calls:
            return "it ended without an answer; ask again, or give another seed"
        case _:
            return None


@contextmanager
def progress_bar(label: str) -> Generator[Callable[[int, int], None]]:
    """A bar with bytes, speed and time left, on standard error; `advance(done, total)` moves it."""
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(TextColumn(label), *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
