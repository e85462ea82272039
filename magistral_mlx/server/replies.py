"""Replies in OpenAI's formats: JSON objects, and chunks as server-sent events.

Chunks are put together as strings: one is sent for every id, and a pydantic object for each would cost more
than all the rest of the server. Does not know how replies are generated.
"""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from magistral_mlx.events import FinishReason, Stats, ToolCall, ToolCallToken
from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.wire import TokenLogprob

from . import failures
from .rendering import Delta
from .wire import Sampled

REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "tool_calls": "tool_calls",
    "length": "length",
    "loop": "length",
}


class ChoiceEnd(NamedTuple):
    """The end of one choice."""

    reason: FinishReason
    stats: Stats
    calls: tuple[ToolCall, ...] = ()
    stop_string: str | None = None


class Choice(NamedTuple):
    """One choice, whole."""

    deltas: Sequence[Delta]
    ended: ChoiceEnd

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def thinking(self) -> str:
        return "".join(delta.thinking for delta in self.deltas)

    @property
    def reason(self) -> str:
        return REASONS[self.ended.reason]


class ReplyEncoder(Protocol):
    """One response as bytes, whole or in pieces, in the format of one API."""

    @property
    def id(self) -> str: ...

    def opening(self, index: int) -> bytes:
        """Sent first, without waiting for the model."""
        ...

    def piece(self, index: int, delta: Delta) -> bytes: ...

    def ending(self, index: int, ended: ChoiceEnd) -> bytes: ...

    def last(self, ends: Sequence[ChoiceEnd]) -> bytes:
        """Sent when all choices have ended."""
        ...

    def failed(self, error: Exception) -> bytes:
        """Sent instead of everything that was still to come."""
        ...

    def whole(self, choices: Sequence[Choice]) -> bytes: ...


class OpenAIEncoder:
    """What chat completions and plain completions have in common."""

    kind = piece_kind = prefix = ""

    def __init__(self, model: str, tokenizer: Tokenizer, request: Sampled) -> None:
        self._tokenizer = tokenizer
        self._n = request.n or 1
        self._include_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._about = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        about = json.dumps({**self._about, "object": self.piece_kind})
        self._head = f'data: {about[:-1]}, "choices": '

    @property
    def id(self) -> str:
        return str(self._about["id"])

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def last(self, ends: Sequence[ChoiceEnd]) -> bytes:
        usage = f'{self._head}[], "usage": {json.dumps(self._usage(ends))}}}\n\n'.encode()
        return (usage if self._include_usage else b"") + b"data: [DONE]\n\n"

    def failed(self, error: Exception) -> bytes:
        return b"data: " + failures.refusal(error).body + b"\n\n"

    def whole(self, choices: Sequence[Choice]) -> bytes:
        encoded = [self.choice(index, choice) for index, choice in enumerate(choices)]
        used = self._usage([choice.ended for choice in choices])
        body = {**self._about, "object": self.kind, "choices": encoded, "usage": used}
        return json.dumps(body, ensure_ascii=False).encode()

    def _usage(self, ends: Sequence[ChoiceEnd]) -> dict[str, Any]:
        """Token counts of a request; a prompt counts once, however many choices it has."""
        stats = [end.stats for end in ends]
        prompts = stats[:: self._n]
        prompt = sum(one.prompt_tokens for one in prompts)
        completion = sum(one.thinking_tokens + one.answer_tokens for one in stats)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
            "completion_tokens_details": {"reasoning_tokens": sum(one.thinking_tokens for one in stats)},
        }


class ChatEncoder(OpenAIEncoder):
    kind, piece_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, index: int) -> bytes:
        return self._piece(index, '{"role": "assistant", "content": ""}')

    def piece(self, index: int, delta: Delta) -> bytes:
        if delta.thinking:
            text = json.dumps(delta.thinking, ensure_ascii=False)
            return self._piece(index, f'{{"reasoning_content": {text}, "reasoning": {text}}}')
        if delta.call:
            content = {"content": delta.text} if delta.text else {}
            return self._piece(index, json.dumps(content | {"tool_calls": [_call(delta.call)]}))
        logprobs = json.dumps(self._logprobs([delta])) if delta.logprobs else "null"
        return self._piece(
            index, f'{{"content": {json.dumps(delta.text, ensure_ascii=False)}}}', logprobs=logprobs
        )

    def ending(self, index: int, ended: ChoiceEnd) -> bytes:
        return self._piece(index, "{}", f'"{REASONS[ended.reason]}"')

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        thinking = choice.thinking or None
        calls = [call.message for call in choice.ended.calls]
        message = {"role": "assistant", "content": choice.text or (None if calls else ""), "refusal": None}
        message |= {"reasoning_content": thinking, "reasoning": thinking}
        message |= {"tool_calls": calls} if calls else {}
        logprobs = self._logprobs(choice.deltas)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}

    def _piece(self, index: int, delta: str, reason: str = "null", *, logprobs: str = "null") -> bytes:
        one = f'[{{"index": {index}, "delta": {delta}, "logprobs": {logprobs}, "finish_reason": {reason}}}]'
        return f"{self._head}{one}}}\n\n".encode()

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        """Log-probabilities of the ids behind the text; forced ids (not sampled) have none."""
        found = [logprob for one in deltas for logprob in one.logprobs if logprob]
        return {"content": [self._scored(one) for one in found], "refusal": None} if found else None

    def _scored(self, scored: TokenLogprob) -> dict[str, Any]:
        top = [self._token(id_, logprob) for id_, logprob in scored.top]
        return self._token(scored.id, scored.logprob) | {"top_logprobs": top}

    def _token(self, id_: int, logprob: float) -> dict[str, Any]:
        piece = self._tokenizer.pieces[id_] or b""
        return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": [*piece]}


def _call(piece: ToolCallToken) -> dict[str, Any]:
    """A piece of a tool call; only the first one names the function."""
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.text}}
    function = {"name": piece.name, "arguments": piece.text}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}
