"""Events of a stream, tool calls and statistics: frozen values, no arrays.

`ThinkToken`, `AnswerToken` and `ToolCallToken` carry text as it becomes visible, and the token ids it was
decoded from. Ids without visible text of their own (a tag, half a character, end of text) are attached to the
next event, so that the ids of all events, joined, are those of the reply. All are sampled, except those of a
closing tag that was forced, which has an event of its own. `Finished` comes last, once.

Does not know how text is split into phases (`thinking`), how ids become text (`tokenizer`, `transcript`).
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from .errors import PromptError

FinishReason: TypeAlias = Literal["stop", "tool_calls", "length", "loop", "cancelled"]
"""`stop`: end of text or a stop string; `tool_calls`: the same, and there are calls to answer; `length`:
max_tokens or the context is spent; `loop`: the answer repeated itself without end; `cancelled`: closed early
(on a `Reply` only: a closed stream yields nothing more)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkToken:
    """A piece of the reasoning, tags and outer white space stripped.

    forced: the ids were not sampled but inserted: the tag that closes the reasoning early. Such an event has
        only these ids, and no text; sampled ids that have not become text yet come before it, on an event
        that may be empty too.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    forced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerToken:
    """A piece of the answer, without leading blank lines."""

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallToken:
    """A piece of a tool call. The first one has the call's `id` and `name`; `text` is part of its arguments.

    Pieces are provisional: a call that is cut off, or whose arguments are no JSON object, is emitted again as
    answer text and is not among `Reply.tool_calls`.

    index: of the call, counted in order of appearance from 0.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    index: int
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A complete call: answer it with the message that `result` returns.

    id: 9 letters and digits, unique within a reply.
    name: as the model wrote it; it may name no tool that was offered.
    arguments: a JSON object, as text.
    """

    id: str
    name: str
    arguments: str

    @property
    def message(self) -> dict[str, Any]:
        """This call as an item of an assistant message's `tool_calls`."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }

    def result(self, content: object) -> dict[str, Any]:
        """The message that answers this call. What is not text becomes JSON, or raises a `PromptError`."""
        if not isinstance(content, str):
            try:
                content = json.dumps(content, ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise PromptError(f"Expected a tool's result to be text or JSON: {error}.") from error
        return {"role": "tool", "tool_call_id": self.id, "content": content}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Where tokens and seconds went in one reply.

    `thinking_tokens + answer_tokens` is every id of the reply, tags and end of text included: an id counts
    for the phase that it leads to. Seconds are compute time; time in which the consumer did not request the
    next event is not counted.

    cached_tokens: prompt tokens reused from an earlier KV cache, not prefilled again.
    forced_tokens: thinking tokens that were inserted to close the reasoning.
    forward_passes: of the model, for the sampled ids: one each, or fewer with speculation.
    first_token_seconds, first_answer_seconds: from the start to the first id, and to the first of the answer
        (0: there was none).
    peak_memory: peak bytes of arrays in this process while this reply's own steps ran, by MLX's counter: the
        model, this reply's KV cache and whatever else is allocated; not what steps of other streams allocated
        in between. MLX's counter is reset at every step for this.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    thinking_tokens: int = 0
    answer_tokens: int = 0
    forced_tokens: int = 0
    forward_passes: int = 0
    prefill_seconds: float = 0.0
    thinking_seconds: float = 0.0
    answer_seconds: float = 0.0
    first_token_seconds: float = 0.0
    first_answer_seconds: float = 0.0
    peak_memory: int = 0

    @property
    def decode_seconds(self) -> float:
        return self.thinking_seconds + self.answer_seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        read = self.prompt_tokens - self.cached_tokens
        return read / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        tokens = self.thinking_tokens + self.answer_tokens
        return tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """1 without speculation; with it, 1 plus the accepted drafts per pass."""
        own = self.thinking_tokens + self.answer_tokens - self.forced_tokens
        return own / self.forward_passes if self.forward_passes else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end of a stream that ran to its end."""

    reason: FinishReason
    stats: Stats = field(default_factory=Stats)
    token_ids: tuple[int, ...] = ()


Event: TypeAlias = ThinkToken | AnswerToken | ToolCallToken | Finished
