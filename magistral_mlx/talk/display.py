"""A stream shown in a terminal: reasoning dim, the answer plain, and apart when output is redirected.

On a terminal both go to standard output. If that is a file or a pipe, it gets the answer only, and the
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
"""Characters with which a model's text could control a terminal (move the cursor, write the clipboard)."""


class Terminal:
    """Shows one reply after another on standard output and standard error."""

    def __init__(self, *, show_thinking: bool = True) -> None:
        self.show_thinking = show_thinking
        self._lines = Lines()

    def show(self, events: Iterable[Event]) -> Finished | None:
        """Show a reply as it is generated; returns its `Finished` event, or None if the stream was closed."""
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
        """A status line, to standard error, and only if that is a terminal."""
        if sys.stderr.isatty():
            click.secho(_wrapped(text, get_terminal_size().columns - 1), dim=True, err=True)

    def _write(self, text: str, *, thinking: bool = False) -> None:
        """Write text to its stream at once; click leaves styles out where that is no terminal."""
        is_terminal = sys.stdout.isatty()
        shown = text.translate(_CONTROLS) if is_terminal else text
        if is_terminal and environ.get("TERM") != "dumb":
            shown = self._lines.feed(shown, columns=get_terminal_size().columns)
        click.secho(shown, dim=thinking, nl=False, err=thinking and not is_terminal)


def print_error(text: str) -> None:
    """An error message, to standard error, terminal or not."""
    click.echo(text, err=True)


def _wrapped(text: str, columns: int) -> str:
    """Wrap to so many columns; the parts of a list separated by " · " are not broken."""
    if " · " in text:
        text = " · ".join(part.replace(" ", "\xa0") for part in text.split(" · "))
    return "\n".join(textwrap.wrap(text, columns, break_long_words=False)).replace("\xa0", " ")


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


def problem_of(reply: "Reply") -> str | None:
    """One line for the user if a reply was cut short or has no answer; otherwise None."""
    match reply.finish_reason:
        case "length":
            return "cut off: max_tokens or the context was used up"
        case "loop":
            return "stopped: it repeated itself without end"
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
