"""Where reasoning ends and the answer begins, in streamed text.

Knows the two ways a Magistral marks its reasoning: `<think>` and `</think>` written as plain text (2506), and
control tokens that never become text (2507 and later), which the caller reports. Does not know token ids,
bytes, or time: the same text gives the same phases however it was cut.

Why text and not ids: `</think>` has no spelling of its own. It merges with its neighbours (`.</`, `>The`)
into more than a hundred token sequences, and one token can end the reasoning and begin the answer.

The rules, for which `parse` is the reference:

- Thinking starts only if the first thing that is not white space is the opening tag.
- The first closing tag ends it, even if quoted or in code. Tags after that are answer text.
- If reasoning is never closed, everything is reasoning, and the answer is empty.
- Outer white space of the reasoning is stripped. So are leading blank lines of the answer, but never the
  indentation of its first line.
"""

from typing import Literal, NamedTuple, TypeAlias

OPEN = "<think>"
CLOSE = "</think>"

Phase: TypeAlias = Literal["thinking", "answer"]


class Piece(NamedTuple):
    """Visible text and the phase it belongs to; never empty."""

    phase: Phase
    text: str


def parse(text: str) -> tuple[str, str]:
    """Split a whole transcript with plain-text tags into (thinking, answer)."""
    body = text.lstrip()
    if not body.startswith(OPEN):
        return "", _without_blank_lines(text)
    thinking, _, answer = body.removeprefix(OPEN).partition(CLOSE)
    return thinking.strip(), _without_blank_lines(answer)


class ThinkParser:
    """`parse`, one chunk at a time: `feed` text as it comes, `flush` once at the end.

    Text is held back only while it is undecided: white space that may turn out to be outer, and at most seven
    characters that may begin a tag. With `tags="control"` tags are not looked for in the text; the caller
    reports them with `mark_open` and `mark_close`, after feeding all text that came before them.
    """

    def __init__(self, *, tags: Literal["text", "control"] = "text") -> None:
        self._tags = tags
        # Only ever forward: start → thinking → answer, or start → answer.
        self._state: Literal["start", "thinking", "answer"] = "start"
        self._shown = False  # whether this state has emitted text
        self._held = ""
        self._late = False  # whether one more closing tag is to be dropped from the answer

    @property
    def phase(self) -> Phase:
        """The phase after the text fed so far. Thinking while undecided, so that it changes once at most."""
        return "answer" if self._state == "answer" else "thinking"

    @property
    def can_close(self) -> bool:
        """Whether `force_close` is allowed: thinking has begun, and not ended."""
        return self._state == "thinking"

    @property
    def in_tag(self) -> bool:
        """Whether the text so far ends with a possible beginning of a closing tag."""
        return self.can_close and self._tags == "text" and unfinished(self._held, CLOSE) > 0

    def force_close(self, *, late: bool = True) -> list[Piece]:
        """Close the reasoning here. late: drop one closing tag that the model may still generate."""
        assert self.can_close
        pieces = self.flush()  # a partial tag becomes text
        self._enter("answer", "")
        self._late = late and self._tags == "text"
        return pieces

    def interrupt(self) -> list[Piece]:
        """A tool call begins here: it ends the reasoning, and is not text itself. Text may follow it."""
        pieces = self.flush()
        if self._state == "thinking":
            self._enter("answer", "")
        return pieces

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._start()
        if self._state == "thinking":
            pieces += self._think()
        if self._state == "answer":
            pieces += self._answer()
        return pieces

    def flush(self) -> list[Piece]:
        """The text still held back, at the end of the input. Outer white space is dropped."""
        if self._state == "start":
            self._enter("answer", self._held)  # a partial opening tag is text
        return self._show(self._held.rstrip()) if self._state == "thinking" else self._answer(at_end=True)

    def mark_open(self) -> None:
        """The opening control token came. It counts only before any text; elsewhere it is ignored."""
        assert self._tags == "control"
        if self._state == "start":
            self._enter("thinking", "")

    def mark_close(self) -> None:
        """The closing control token came. It counts only while thinking; elsewhere it is ignored."""
        assert self._tags == "control"
        if self._state == "thinking":
            self._enter("answer", "")

    def _start(self) -> None:
        body = self._held.lstrip()
        if self._tags == "text" and body.startswith(OPEN):
            self._enter("thinking", body.removeprefix(OPEN))
        elif body and not (self._tags == "text" and OPEN.startswith(body)):
            self._enter("answer", self._held)

    def _think(self) -> list[Piece]:
        if self._tags == "text" and CLOSE in self._held:
            thinking, _, answer = self._held.partition(CLOSE)
            pieces = self._show(thinking.rstrip())
            self._enter("answer", answer)
            return pieces
        undecided = unfinished(self._held, CLOSE) if self._tags == "text" else 0
        return self._show(self._held[: len(self._held) - undecided].rstrip())

    def _answer(self, *, at_end: bool = False) -> list[Piece]:
        if self._late and CLOSE in self._held:
            self._held = self._held.replace(CLOSE, "", 1)
            self._late = False
        if not self._shown:
            self._held = _without_blank_lines(self._held) or self._held
        undecided = unfinished(self._held, CLOSE) if self._late and not at_end else 0
        text = self._held[: len(self._held) - undecided]
        # Leading white space is held: what follows, or follows a late tag, may make it a blank line.
        return self._show(text) if self._shown or not text.isspace() else []

    def _show(self, text: str) -> list[Piece]:
        """Remove `text` from the beginning of the held text, and emit it."""
        self._held = self._held[len(text) :]
        visible = text.lstrip() if self._state == "thinking" and not self._shown else text
        self._shown = self._shown or bool(visible)
        return [Piece(self.phase, visible)] if visible else []

    def _enter(self, state: Literal["thinking", "answer"], held: str) -> None:
        self._state, self._shown, self._held = state, False, held


def unfinished(text: str, tag: str) -> int:
    """Length of the longest suffix of `text` with which `tag` begins, shorter than `tag` itself."""
    start = max(len(text) - len(tag) + 1, 0)
    while (start := text.find(tag[0], start)) >= 0:
        if tag.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


def _without_blank_lines(text: str) -> str:
    """`text` from its first line that is not blank; empty if there is none."""
    body = text.lstrip()
    indentation = text[: len(text) - len(body)].rpartition("\n")[2]
    return indentation + body if body else ""
