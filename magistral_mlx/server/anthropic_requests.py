"""Anthropic's requests → OpenAI's, which `requests` then translates for the library.

Knows both request formats. Does not know the library.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from .anthropic_wire import (
    Block,
    CountRequest,
    Disabled,
    Enabled,
    MessagesRequest,
    Text,
    Thinking,
    Tool,
    ToolChoice,
    ToolResult,
    ToolUse,
    Turn,
)
from .failures import RefusedError
from .wire import ChatRequest, Effort, Message

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat(request: CountRequest) -> ChatRequest:
    """The same request in OpenAI's format."""
    choice, config = request.tool_choice, request.output_config
    asked: dict[str, Any] = {
        "messages": [
            *_system(request.system or ()),
            *(m for turn in request.messages for m in _messages(turn)),
        ],
        "reasoning_effort": _effort(request),
        "think_budget": request.thinking.budget_tokens if isinstance(request.thinking, Enabled) else None,
        "tools": [_tool(tool) for tool in request.tools or ()],
        "tool_choice": choice and _choice(choice),
        "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
    }
    if config and config.format:
        asked["response_format"] = {"type": "json_schema", "json_schema": {"schema": config.format.schema_}}
    if isinstance(request, MessagesRequest):
        asked |= {name: getattr(request, name) for name in ("stream", "max_tokens", *_SAMPLED)}
        asked["stop"] = request.stop_sequences
    return ChatRequest.model_construct(**asked)  # validated already, under the client's field names


_SAMPLED = ("temperature", "top_p", "top_k")


def _effort(request: CountRequest) -> Effort | None:
    if isinstance(request.thinking, Disabled):
        return "none"
    effort = request.output_config and request.output_config.effort
    return "xhigh" if effort == "max" else effort


def _system(blocks: Sequence[Text]) -> list[Message]:
    return [Message(role="system", content=block.text) for block in blocks]


def _messages(turn: Turn) -> Iterator[Message]:
    """One turn as messages: tool results before the text beside them, the order that the model expects."""
    _check(turn)
    if turn.role == "assistant":
        yield _assistant(turn.content)
        return
    for block in turn.content:
        if isinstance(block, ToolResult):
            yield Message(role="tool", tool_call_id=block.tool_use_id, content=_result(block))
    for block in turn.content:
        if isinstance(block, Text):
            yield Message(role=turn.role, content=block.text)


def _assistant(blocks: Sequence[Block]) -> Message:
    calls = [_call(block) for block in blocks if isinstance(block, ToolUse)]
    return Message(
        role="assistant",
        content="".join(block.text for block in blocks if isinstance(block, Text)),
        reasoning_content="".join(block.thinking for block in blocks if isinstance(block, Thinking)),
        tool_calls=calls,
    )


def _check(turn: Turn) -> None:
    """Refuse blocks that a role cannot have: tool results of an assistant, tool calls of a user."""
    match turn.role:
        case "assistant":
            foreign = [block for block in turn.content if isinstance(block, ToolResult)]
        case "user":
            foreign = [block for block in turn.content if not isinstance(block, Text | ToolResult)]
        case _:
            foreign = [block for block in turn.content if not isinstance(block, Text)]
    if foreign:
        message = f"a message of the role {turn.role} cannot have blocks of the type {foreign[0].type}"
        raise RefusedError(400, message, param="messages", code="invalid_value")


def _call(block: ToolUse) -> dict[str, Any]:
    function = {"name": block.name, "arguments": block.input}
    return {"id": block.id, "type": "function", "function": function}


def _result(block: ToolResult) -> str:
    """A tool's result; a failure is marked in its text, as Mistral's prompt format has no field for it."""
    text = "\n\n".join(part.text for part in block.content or ())
    return f"Error: {text}" if block.is_error else text


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type != "tool":
        return _CHOICES[choice.type]
    if choice.name is None:
        raise RefusedError(400, "a tool_choice of the type tool needs a name", param="tool_choice")
    return {"type": "function", "function": {"name": choice.name}}
