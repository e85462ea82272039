"""A stream shown in a Jupyter notebook: reasoning in a collapsible block, the answer in Markdown.

Redraws at most ten times a second, whatever the model's speed. Knows events and IPython's display; not
models.
"""

import html
import time
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from magistral_mlx.events import AnswerToken, Event, Finished, ThinkToken, ToolCallToken

INTERVAL = 0.1
"""Seconds between two redraws: smooth to the eye, and cheap for a browser that renders all of it again."""


def show(events: Iterable[Event]) -> None:
    """Show a reply as it is generated. Interrupting the kernel ends it; its text so far stays on the page."""
    ipython: Any = import_module("IPython.display")  # any notebook has it; no dependency of this package
    thinking = ipython.display(ipython.HTML(""), display_id=True)
    answer = ipython.display(ipython.Markdown(""), display_id=True)
    view, drawn = _View(), 0.0

    def redraw() -> None:
        thinking.update(ipython.HTML(view.thinking()))
        answer.update(ipython.Markdown(view.markdown()))

    try:
        for event in events:
            view.take(event)
            if time.monotonic() - drawn >= INTERVAL:
                redraw()
                drawn = time.monotonic()
    finally:
        view.over = True
        redraw()


class _View:
    """The reply so far, as HTML and Markdown."""

    def __init__(self) -> None:
        self.answer = ""
        self.calls = ""
        self.over = False
        self._thoughts = ""
        self._tokens = 0
        self._began = time.monotonic()
        self._seconds = 0.0

    def take(self, event: Event) -> None:
        match event:
            case ThinkToken(text=text, token_ids=ids):
                self._thoughts += text
                self._tokens += len(ids)
                self._seconds = time.monotonic() - self._began
            case AnswerToken(text=text):
                self.answer += text
            case ToolCallToken(text=text, name=name):
                self.calls += f"\n{name} {text}" if name else text
            case Finished(stats=stats):
                self._tokens, self._seconds = stats.thinking_tokens, stats.thinking_seconds

    def markdown(self) -> str:
        """The answer, and the tool calls below it, as code."""
        return self.answer + (f"\n\n```{self.calls}\n```" if self.calls else "")

    def thinking(self) -> str:
        """A block that is open while the model thinks, and collapsed once the answer begins."""
        if not self._thoughts:
            return "" if self.markdown() or self.over else "<i>thinking …</i>"
        thinks = not self.markdown() and not self.over
        took = f"{self._seconds:.0f} s" if self._seconds >= 1 else "a moment"
        title = "Thinking …" if thinks else f"Thought for {took} · {self._tokens:,} tokens"
        return (
            f"<details{' open' if thinks else ''}><summary>{title}</summary>"
            f'<div style="white-space: pre-wrap; opacity: 0.7; border-left: 3px solid; padding-left: 0.8em">'
            f"{html.escape(self._thoughts)}</div></details>"
        )
