"""Messages → token ids and ids → text, by mistral_common.

Knows mistral_common: its requests, its errors, its control tokens. Every id of a prompt comes from it; no
chat template is written out here. Does not know phases (`thinking`), events (`transcript`) or arrays.

mistral_common is imported when the first tokenizer is opened: it takes about a second.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeAlias, cast, get_args

from magistral_mlx.checks import check_text
from magistral_mlx.errors import MagistralWarning, PromptError, TokenizerError
from magistral_mlx.events import ToolCall

from .detokenizer import Detokenizer
from .prompt import CONTROL_TAGS_PROMPT, TEXT_TAGS_PROMPT, Messages, Turn, read_messages, without_thinking
from .thinking import CLOSE, OPEN
from .toolcalls import Marker
from .tools import Tools, read_tools

VERSIONS = ("v7", "v11", "v13")
"""Tokenizer versions whose template has a system prompt between control tokens, as Magistral's does."""

ORIGINAL = "mistralai/Magistral-Small-2506"
"""A repository on the Hub that has these files."""

_Content: TypeAlias = str | list[dict[str, str]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """One `tekken.json` and the system prompt of its checkpoint. Safe to share between threads."""

    version: str
    vocab_size: int
    bos_id: int
    eos_id: int
    think_ids: tuple[int, int] | None
    """The ids of `[THINK]` and `[/THINK]`, or None where the tags are plain text."""
    call_markers: dict[int, Marker]
    """The control tokens of tool calls, by id."""
    system_prompt: str = field(repr=False)
    _mistral: Any = field(repr=False)  # a MistralTokenizer: it has seven type parameters, so untyped

    @classmethod
    def from_directory(cls, directory: Path | str) -> Self:
        """Open `tekken.json` and `SYSTEM_PROMPT.txt` of a model directory: in its root, or in `mistral/`."""
        directory = Path(directory)
        file = find_text_file(directory, "tekken.json")
        if file is None:
            found = ", ".join(sorted(entry.name for entry in directory.glob("*"))) or "nothing"
            raise TokenizerError(
                f"Expected tekken.json in {directory} or its mistral/, found {found}. Conversions often "
                f"leave it out: copy it and SYSTEM_PROMPT.txt from the original repository ({ORIGINAL}, say)."
            )
        text = find_text_file(directory, "SYSTEM_PROMPT.txt")
        return cls.from_file(file, system_prompt=None if text is None else _read(text))

    @classmethod
    def from_file(cls, path: Path | str, *, system_prompt: str | None = None) -> Self:
        """Open a `tekken.json`. Without a system prompt, that of the model card is used."""
        mistral = _open(Path(path))
        tekken = mistral.instruct_tokenizer.tokenizer
        version = str(tekken.version.value)
        if version not in VERSIONS:
            raise TokenizerError(
                f"Expected {path} to be of version {', '.join(VERSIONS)}, found {version}. Use a Magistral's."
            )
        think_ids = None
        if tekken.is_special("[THINK]") and tekken.is_special("[/THINK]"):
            think_ids = tekken.get_special_token("[THINK]"), tekken.get_special_token("[/THINK]")
        default = TEXT_TAGS_PROMPT if think_ids is None else CONTROL_TAGS_PROMPT
        return cls(
            version=version,
            vocab_size=tekken.n_words,
            bos_id=tekken.bos_id,
            eos_id=tekken.eos_id,
            think_ids=think_ids,
            call_markers={
                tekken.get_special_token(name): name for name in get_args(Marker) if tekken.is_special(name)
            },
            system_prompt=default if system_prompt is None else system_prompt,
            _mistral=mistral,
        )

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: no begin or end of text, and no string in it becomes a control token.

        Raises:
            PromptError: not a string of Unicode text, or too long a run of white space.
        """
        text = check_text(text, "the text", may_be_blank=True)
        try:
            return self._tekken.encode(text, bos=False, eos=False)
        except ValueError as error:  # a million spaces in a row, say
            raise PromptError(f"tekken cannot split this text into words: {error}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. A control token has none; broken UTF-8 and unknown ids are U+FFFD."""
        detokenizer = self.detokenizer()
        return "".join(map(detokenizer.feed, ids)) + detokenizer.flush()

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self.pieces)

    def encode_chat(
        self,
        messages: Messages,
        *,
        system: str | None = None,
        think: bool = True,
        keep_thinking: bool = False,
        tools: Tools = (),
    ) -> list[int]:
        """The ids of a conversation that ends with a user's message or a tool's, ready for the model's reply.

        The checkpoint's system prompt, which makes the model think, comes first; `system` is placed before
        it, and `think=False` leaves it out. A system message in `messages` replaces all of that, verbatim.
        Reasoning before the last question is dropped unless `keep_thinking`, and with it a reply that has
        nothing else. Tool definitions are placed where the template of this version has them.

        Raises:
            PromptError: messages that the template does not allow, or invalid tools.
        """
        turns = read_messages(messages)
        if not keep_thinking:
            turns = without_thinking(turns)
        turns = [  # mistral_common refuses empty ones
            turn for turn in turns if turn.content or turn.thinking or turn.calls or turn.tool_call_id
        ]
        own = [turn.content for turn in turns if turn.role == "system"]
        if own and system is not None:
            raise PromptError("Expected either system=… or a system message, found both. Leave one out.")
        if own and think:
            self._warn_if_no_think_template(own)
        if not own:
            before = None if system is None else check_text(system, "system")
            parts = [part for part in (before, self.system_prompt if think else None) if part]
            if parts:
                turns.insert(0, Turn(role="system", content="\n\n".join(parts)))
        return self._encode(turns, tools)

    def encode_turn(
        self,
        message: Messages,
        *,
        calls: Sequence[ToolCall] = (),
        tools: Tools = (),
        history: Sequence[int] = (),
    ) -> list[int] | None:
        """The ids to append to a running conversation, after its end of text.

        message: one more user message, or the results of `calls`, which the reply before it made.
        history: the conversation so far: a prompt and that reply. Returns None if it lacks what the template
            would have there: a call id that a result names, or `tools`, unless they come with this message.
        """
        if isinstance(message, str):
            message = [{"role": "user", "content": check_text(message, "the message")}]
        reply = {"role": "assistant", "content": "-", "tool_calls": [call.message for call in calls]}
        ids = self._encode(read_messages([{"role": "user", "content": "-"}, reply, *message]), tools)
        turn = ids[len(ids) - ids[::-1].index(self.eos_id) :]
        if self._tools_in(history) + self._tools_in(turn) != self._tools_in(ids):
            return None
        before, now = (self.decode(ids) if calls else "" for ids in (history, turn))
        return turn if all(call.id in before for call in calls if call.id in now) else None

    def _tools_in(self, ids: Sequence[int]) -> list[int]:
        """The ids of the tool definitions in a prompt, or in a part of one."""
        begin, end = map(self._tekken.get_special_token, ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"))
        return [*ids[ids.index(begin) : ids.index(end)]] if begin in ids else []

    def _content(self, turn: Turn) -> _Content:
        """Text, or chunks where reasoning has control tokens."""
        if turn.role == "system" and self.think_ids and (found := _think_template(turn.content)):
            before, thinking, after = found
            return [_text(before), _thinking(thinking), _text(after)]
        if not turn.thinking:
            return turn.content
        if self.think_ids:
            return [_thinking(turn.thinking), _text(turn.content)]
        return f"{OPEN}\n{turn.thinking}\n{CLOSE}\n{turn.content}"

    def _message(self, turn: Turn) -> dict[str, Any]:
        """A turn in mistral_common's format."""
        message: dict[str, Any] = {"role": turn.role, "content": self._content(turn)}
        if turn.calls:
            message["tool_calls"] = [call.message for call in turn.calls]
        if turn.tool_call_id:
            message["tool_call_id"] = turn.tool_call_id
        return message

    def _encode(self, turns: Sequence[Turn], tools: Tools) -> list[int]:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        given = {"messages": [self._message(turn) for turn in turns], "tools": read_tools(tools) or None}
        try:
            request = cast("Any", ChatCompletionRequest).model_validate(given)
            return self._mistral.encode_chat_completion(request).tokens
        except (MistralCommonException, ValueError, AssertionError, RecursionError) as error:
            raise PromptError(f"mistral_common refuses these messages: {error}") from error

    def has_think_template(self, text: str) -> bool:
        """Whether a system prompt has the think template, without which the model does not think."""
        return _think_template(text) is not None if self.think_ids else OPEN in text

    def _warn_if_no_think_template(self, system: list[str]) -> None:
        if not any(map(self.has_think_template, system)):
            tags = "[THINK]…[/THINK]" if self.think_ids else f"{OPEN}…{CLOSE}"
            warnings.warn(
                f"The system message has no {tags} template, without which the model does not think. Use "
                "system=… to add to the checkpoint's prompt, or think=False if this is meant.",
                MagistralWarning,
                stacklevel=3,
            )

    @property
    def _tekken(self) -> Any:
        return self._mistral.instruct_tokenizer.tokenizer

    @cached_property
    def pieces(self) -> list[bytes | None]:
        """The bytes of every id, None for a control token. Cached: mistral_common is 50 times slower."""
        tekken = self._tekken
        controls: list[bytes | None] = [None] * tekken.num_special_tokens
        return controls + [tekken.id_to_byte_piece(i) for i in range(len(controls), self.vocab_size)]


def _think_template(text: str) -> tuple[str, str, str] | None:
    """The text before, inside and after the last `[THINK]…[/THINK]`.

    By string search: a regular expression takes quadratic time.
    """
    start = text.rfind("[THINK]", 0, max(text.rfind("[/THINK]"), 0))
    if start < 0:
        return None
    _, _, rest = text[start:].partition("[THINK]")
    thinking, _, after = rest.partition("[/THINK]")
    return text[:start], thinking, after


def find_text_file(directory: Path, name: str) -> Path | None:
    """A tokenizer file or system prompt of a model directory: in its root, or in `mistral/`."""
    places = (directory / name, directory / "mistral" / name)
    return next((place for place in places if place.is_file()), None)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"Expected {file} to be readable UTF-8 text: {error}. Download it again."
        ) from error


def _open(path: Path) -> Any:
    if not path.is_file():
        raise TokenizerError(f"Expected a tekken.json at {path}, found no file. {ORIGINAL} has one.")
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    try:
        return cast("Any", MistralTokenizer).from_file(path)
    # mistral_common's own errors, and those that it runs into with JSON that is no tokenizer.
    except (
        MistralCommonException,
        ValueError,
        AssertionError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        reason = f"{type(error).__name__}: {error}"[:300]  # some print the whole vocabulary
        raise TokenizerError(f"Expected {path} to be a tekken.json ({reason}). Download it again.") from error


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _thinking(text: str) -> dict[str, str]:
    return {"type": "thinking", "thinking": text}
