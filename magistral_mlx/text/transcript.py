"""Token ids as they are sampled → events: text with its phase, tool calls, and every id accounted for.

Connects the detokenizer with the parsers of tool calls and of reasoning, and ends the answer at a stop
string. Does not know where ids come from, or when a reply ends and why (`reply`).
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeAlias

from magistral_mlx.errors import SamplingError
from magistral_mlx.events import AnswerToken, ThinkToken, ToolCall, ToolCallToken

from .thinking import CLOSE, Phase, Piece, ThinkParser, unfinished
from .tokenizer import Tokenizer
from .toolcalls import CallParser, Part

TextEvent: TypeAlias = ThinkToken | AnswerToken | ToolCallToken

_PAUSE = re.compile(r"(\n|(?<!\d)[.!?…]|[。！？؟।])[\"'”’»)\]*`」』）]*\s?$")  # noqa: RUF001 -- full-width ones are meant
"""The end of a line or sentence."""


class Transcript:
    """`feed` every id that was sampled, the end of text too; `flush` once, at the end.

    An id whose text is not visible yet (a tag, half a character, what may begin a stop string) is attached to
    the next event. `flush` returns the ids that are left over besides its events, for `Finished`.

    calls: the parser of tool calls; None: no tools were offered, and their control tokens mean nothing.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop: tuple[str, ...] = (), calls: CallParser | None = None
    ) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._think_ids = tokenizer.think_ids
        self._parser = ThinkParser(tags="control" if self._think_ids else "text")
        self._stop = StopStrings(stop)
        self._calls = calls or CallParser("")
        self._markers = tokenizer.call_markers if calls else {}
        self._pending: list[int] = []
        self._tail = ""
        self._texts: dict[Phase, list[str]] = {"thinking": [], "answer": []}

    @property
    def phase(self) -> Phase:
        """The phase after the ids fed so far; see `ThinkParser.phase`."""
        return self._parser.phase

    @property
    def can_close(self) -> bool:
        """Whether `force_close` is allowed: reasoning has begun, and not ended."""
        return self._parser.can_close

    @property
    def torn(self) -> bool:
        """Whether a close now would split a character, or a possible tag."""
        return self._parser.in_tag or self._detokenizer.pending

    @property
    def at_pause(self) -> bool:
        """Whether the text so far ends a line or a sentence (`3.` does not: the number may go on)."""
        return _PAUSE.search(self._tail) is not None

    @property
    def stopped(self) -> bool:
        """Whether a stop string, or the maximum number of calls, has ended the reply."""
        return self._stop.met is not None or self._calls.full

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found. Ids fed after it give no text."""
        return self._stop.met

    @property
    def thinking(self) -> str:
        return "".join(self._texts["thinking"])

    @property
    def answer(self) -> str:
        return "".join(self._texts["answer"])

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Those that are complete."""
        return self._calls.calls

    def closing_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The ids that close the reasoning here: the closing tag, on its own line where it is plain text."""
        if self._think_ids:
            return [self._think_ids[1]]
        return tokenizer.encode(("" if self._tail.endswith("\n") else "\n") + CLOSE + "\n")

    def force_close(self, ids: list[int], *, late: bool = True) -> list[TextEvent]:
        """Close the reasoning here, with `ids` from `closing_ids`; they get an event of their own.

        late: drop a closing tag that the model may still generate.
        Ids still without text come before that, if need be on an event without text.
        """
        events = self._text_events(
            self._parser.feed(self._detokenizer.flush()) + self._parser.force_close(late=late)
        )
        if self._pending:
            events.append(ThinkToken(text="", token_ids=tuple(self._pending)))
            self._pending = []
        return [*events, ThinkToken(text="", token_ids=tuple(ids), forced=True)]

    def feed(self, token_id: int) -> list[TextEvent]:
        self._pending.append(token_id)
        text = self._detokenizer.feed(token_id)
        self._tail = (self._tail + text)[-8:]
        events = self._call_events(self._calls.feed(text))
        if marker := self._markers.get(token_id):
            if marker == "[TOOL_CALLS]":
                events += self._interrupt()
            events += self._call_events(self._calls.mark(marker))
        elif self._think_ids and token_id == self._think_ids[0]:
            self._parser.mark_open()
        elif self._think_ids and token_id == self._think_ids[1]:
            self._parser.mark_close()
        return events

    def flush(self) -> tuple[list[TextEvent], tuple[int, ...]]:
        """The last events, and the ids left over."""
        events = self._call_events(self._calls.feed(self._detokenizer.flush()))
        events += self._call_events(self._calls.flush()) + self._text_events(self._parser.flush())
        events += self._event("answer", self._stop.flush())
        leftover, self._pending = tuple(self._pending), []
        return events, leftover

    def _interrupt(self) -> list[TextEvent]:
        """A tool call begins: emit the text that was held back, and end the reasoning."""
        events = self._call_events(self._calls.flush()) + self._text_events(self._parser.interrupt())
        return events + self._event("answer", self._stop.flush())

    def _call_events(self, parts: Iterable[Part]) -> list[TextEvent]:
        """Events of pieces of calls, and of the text outside of them."""
        events: list[TextEvent] = []
        for part in parts:
            if isinstance(part, str):
                events += self._text_events(self._parser.feed(part))
            else:
                token_ids, self._pending = tuple(self._pending), []
                events.append(replace(part, token_ids=token_ids))
        return events

    def _text_events(self, pieces: list[Piece]) -> list[TextEvent]:
        events: list[TextEvent] = []
        for phase, text in pieces:
            events += self._event(phase, text if phase == "thinking" else self._stop.feed(text))
        return events

    def _event(self, phase: Phase, text: str) -> list[TextEvent]:
        if not text:
            return []
        self._texts[phase].append(text)
        token_ids, self._pending = tuple(self._pending), []
        kind = ThinkToken if phase == "thinking" else AnswerToken
        return [kind(text=text, token_ids=token_ids)]


class StopStrings:
    """Text up to the stop string that is complete first, however the text is chunked."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        if not all(stops):
            raise SamplingError(f"Expected stop strings with at least one character, found {stops!r}.")
        self._stops = stops
        self._held = ""
        self.met: str | None = None

    def feed(self, text: str) -> str:
        if self.met is not None:
            return ""
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.met = min(found)
            return self._held[:at]
        undecided = max((unfinished(self._held, stop) for stop in self._stops), default=0)
        return self._release(len(self._held) - undecided)

    def flush(self) -> str:
        return "" if self.met is not None else self._release(len(self._held))

    def _release(self, size: int) -> str:
        visible, self._held = self._held[:size], self._held[size:]
        return visible
