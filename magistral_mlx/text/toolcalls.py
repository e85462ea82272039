"""Parses the tool calls in a model's output: control tokens and streamed text → calls, or text after all.

Knows the two forms: `[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}` for each call, where the id may be missing (v11;
v13 never has it), and one `[TOOL_CALLS][{"name", "arguments"}, …]` for all calls (v7). Does not know token
ids, phases, or which tools there are: the caller reports the control tokens.

The rules:

- A call is valid if its arguments are a JSON object. They end with the object's last brace; what follows,
  other than white space, is text again.
- Arguments are streamed, once they begin as an object. In the v7 form the calls are emitted when the list is
  complete.
- What turns out to be no call (no name, no arguments, no JSON, cut off) is emitted as the text it was,
  including the names of its control tokens.
"""

import json
from typing import Any, Literal, TypeAlias

from magistral_mlx.events import ToolCall, ToolCallToken

from .tools import FUNCTION_NAME, call_id, is_object

Marker: TypeAlias = Literal["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"]
_LONGEST = 80
"""Most characters of a name or an id, with the white space around it."""


Part: TypeAlias = ToolCallToken | str
"""A piece of a call, still without token ids; or text outside of calls."""


class CallParser:
    """`mark` a control token and `feed` text as they come; `flush` once, at the end.

    key: ids of calls that the model leaves out, or gives twice, are derived from it.
    most: the maximum number of calls; None: no limit.
    """

    def __init__(self, key: str, *, most: int | None = None) -> None:
        self._key = key
        self._most = most
        self._state: Literal["text", "name", "id", "arguments", "list", "after"] = "text"
        self._raw: list[str] = []  # the whole call so far, to be emitted as text if it is invalid
        self._held = ""  # the name or id so far, with white space
        self._name = self._id = ""
        self._json: list[str] = []
        self._depth = _Depth()
        self._index = -1
        self._ids: set[str] = set()
        self.calls: tuple[ToolCall, ...] = ()
        """Those that are complete."""

    @property
    def active(self) -> bool:
        """Whether a call has begun, and no text outside of it has followed."""
        return self._state != "text"

    @property
    def full(self) -> bool:
        """Whether the maximum number of calls is reached."""
        return self._most is not None and len(self.calls) >= self._most

    def mark(self, marker: Marker) -> list[Part]:
        """A control token comes here. Feed all text before it first."""
        if marker == "[TOOL_CALLS]":
            parts = self.flush()
            self._state, self._raw, self._held = "name", [marker], ""
            self._name, self._id, self._json, self._depth = "", "", [], _Depth()
            return parts
        if self._state in ("text", "after"):
            return []  # ignored, like any misplaced control token
        self._raw.append(marker)
        word, self._held = self._held.strip(), ""
        if self._state == "name" and word:
            self._name, self._state = word, "id" if marker == "[CALL_ID]" else "arguments"
            return []
        if self._state == "id" and marker == "[ARGS]":
            self._id, self._state = word, "arguments"
            return []
        return self._as_text()

    def feed(self, text: str) -> list[Part]:
        if not text or not self.active:
            return [text] if text else []
        self._raw.append(text)
        match self._state:
            case "name" | "id":
                return self._name_or_id(text)
            case "arguments":
                return self._arguments(text)
            case "list":
                return self._list(text)
            case _:
                return self._as_text() if text.strip() else []

    def flush(self) -> list[Part]:
        """The end of the input. An incomplete call becomes text; white space after a call is dropped."""
        if self._state == "after":
            self._raw, self._state = [], "text"
        return self._as_text() if self.active else []

    def _name_or_id(self, text: str) -> list[Part]:
        """Part of a name or an id: of letters, digits, - and _."""
        self._held += text
        word = self._held.strip()
        if self._state == "name" and word.startswith("["):
            self._state = "list"
            return self._list(self._held.lstrip())
        legal = not word or FUNCTION_NAME.fullmatch(word)
        return [] if legal and len(self._held) <= _LONGEST else self._as_text()

    def _arguments(self, text: str) -> list[Part]:
        new = text if self._json else text.lstrip()
        if not new:
            return []
        if not self._json and not new.startswith("{"):
            return self._as_text()
        first = not self._json
        end = self._depth.feed(new)
        self._json.append(new[:end])
        piece = self._begin if first else self._piece
        parts: list[Part] = [piece(new[:end])]
        if end is None:
            return parts
        arguments = "".join(self._json)
        if not is_object(arguments):
            return parts + self._as_text()
        self.calls += (ToolCall(id=self._id, name=self._name, arguments=arguments),)
        return parts + self._end_call(new[end:])

    def _list(self, text: str) -> list[Part]:
        end = self._depth.feed(text)
        self._json.append(text[:end])
        if end is None:
            return []
        calls = _listed("".join(self._json))[: self._most]
        if not calls:
            return self._as_text()
        parts: list[Part] = []
        for self._name, self._id, arguments in calls:
            parts.append(self._begin(arguments))
            self.calls += (ToolCall(id=self._id, name=self._name, arguments=arguments),)
        return parts + self._end_call(text[end:])

    def _piece(self, text: str) -> ToolCallToken:
        return ToolCallToken(text=text, index=self._index)

    def _begin(self, text: str) -> ToolCallToken:
        """The first piece of a call, with an id that is unique in this reply."""
        self._index += 1
        self._id = call_id(self._id or f"{self._key}/{self._index}")
        while self._id in self._ids:
            self._id = call_id(f"{self._key}/{self._index}/{self._id}")
        self._ids.add(self._id)
        return ToolCallToken(text=text, index=self._index, id=self._id, name=self._name)

    def _end_call(self, rest: str) -> list[Part]:
        self._state, self._raw = "after", []
        return self.feed(rest)

    def _as_text(self) -> list[Part]:
        """What came since the last call is text."""
        raw, self._raw, self._state = "".join(self._raw), [], "text"
        return [raw]


class _Depth:
    """Finds the bracket that closes the first one, outside of strings."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def feed(self, text: str) -> int | None:
        """The length of `text` up to and with that bracket; None: it is not closed yet."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = char == "\\", char != '"'
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return at + 1
        return None


def _listed(text: str) -> list[tuple[str, str, str]]:
    """(name, id, arguments) of each call in a JSON list; empty if any of them is invalid."""
    try:
        found: list[Any] = json.loads(text)
        return [_checked(call["name"], call.get("id"), call["arguments"]) for call in found]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


def _checked(name: str, given: object, arguments: object) -> tuple[str, str, str]:
    if not FUNCTION_NAME.fullmatch(name):
        raise ValueError(name)
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not is_object(text):
        raise ValueError(text)
    own = given if isinstance(given, str) else ""
    (own + text).encode()  # raises, if half of a surrogate pair was escaped
    return name, own, text
