"""Replies in Anthropic's format: a message of content blocks, whole or as server-sent events.

Does not know how replies are generated. A block has one type: reasoning, text, or a tool call.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Any

from magistral_mlx.events import FinishReason, Stats, ToolCall, ToolCallToken

from . import failures
from .rendering import Delta
from .replies import Choice, ChoiceEnd

SIGNATURE = "unsigned"
"""Signature of reasoning blocks: clients drop a block without one. Ignored when it comes back."""

_REASONS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "loop": "max_tokens",
}


class MessageEncoder:
    """One reply (a `ReplyEncoder` of one choice): events in the order that Anthropic's clients expect."""

    def __init__(self, model: str, *, prompt_tokens: int) -> None:
        self._message = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._prompt_tokens = prompt_tokens
        self._index = -1
        self._open = ""  # the type of the open block; empty: none

    @property
    def id(self) -> str:
        return self._message["id"]

    def opening(self, index: int) -> bytes:  # noqa: ARG002 -- there is one choice
        nothing_yet: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        used = _usage(Stats(prompt_tokens=self._prompt_tokens))
        return _event("message_start", message={**self._message, **nothing_yet, "usage": used})

    def piece(self, index: int, delta: Delta) -> bytes:  # noqa: ARG002
        events = b""
        if delta.thinking:
            events += self._ensure_open({"type": "thinking", "thinking": "", "signature": ""})
            events += self._delta("thinking_delta", "thinking", delta.thinking)
        if delta.text:
            events += self._ensure_open({"type": "text", "text": ""})
            events += self._delta("text_delta", "text", delta.text)
        if delta.call:
            events += self._call(delta.call)
        return events

    def ending(self, index: int, ended: ChoiceEnd) -> bytes:  # noqa: ARG002
        delta = {"stop_reason": _reason(ended), "stop_sequence": ended.stop_string}
        event = _event("message_delta", delta=delta, usage=_usage(ended.stats))
        return self._close() + event + _event("message_stop")

    def last(self, ends: Sequence[ChoiceEnd]) -> bytes:  # noqa: ARG002
        return b""

    def failed(self, error: Exception) -> bytes:
        return b"event: error\ndata: " + failures.refusal(error).as_anthropic + b"\n\n"

    def whole(self, choices: Sequence[Choice]) -> bytes:
        [choice] = choices
        ended = choice.ended
        content: list[dict[str, Any]] = [_use(call) for call in ended.calls]
        if choice.text:
            content.insert(0, {"type": "text", "text": choice.text})
        if choice.thinking:
            content.insert(0, {"type": "thinking", "thinking": choice.thinking, "signature": SIGNATURE})
        end = {"stop_reason": _reason(ended), "stop_sequence": ended.stop_string}
        body = {**self._message, "content": content, **end, "usage": _usage(ended.stats)}
        return json.dumps(body).encode()  # ASCII: arguments may contain a lone surrogate, escaped

    def _call(self, piece: ToolCallToken) -> bytes:
        """A piece of a tool call; only the first one names the tool."""
        events = b""
        if piece.name is not None:
            block: dict[str, Any] = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
            events = self._close() + self._ensure_open(block)
        return events + self._delta("input_json_delta", "partial_json", piece.text)

    def _ensure_open(self, block: dict[str, Any]) -> bytes:
        """The events that open `block`, unless one of its type is open."""
        if self._open == block["type"]:
            return b""
        closed = self._close()
        self._open = block["type"]
        self._index += 1
        return closed + _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, kind: str, field: str, text: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind, field: text})

    def _close(self) -> bytes:
        was, self._open = self._open, ""
        signed = self._delta("signature_delta", "signature", SIGNATURE) if was == "thinking" else b""
        return signed + _event("content_block_stop", index=self._index) if was else b""


def _event(kind: str, **fields: Any) -> bytes:
    data = json.dumps({"type": kind, **fields}, ensure_ascii=False)
    return f"event: {kind}\ndata: {data}\n\n".encode()


def _reason(ended: ChoiceEnd) -> str:
    met = ended.reason == "stop" and ended.stop_string is not None
    return "stop_sequence" if met else _REASONS[ended.reason]


def _use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}


def _usage(stats: Stats) -> dict[str, Any]:
    """Token counts; those of the prompt are split into computed now and reused from the cache."""
    return {
        "input_tokens": stats.prompt_tokens - stats.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stats.cached_tokens,
        "output_tokens": stats.thinking_tokens + stats.answer_tokens,
        "output_tokens_details": {"thinking_tokens": stats.thinking_tokens},
    }
