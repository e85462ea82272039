"""Request bodies of `/v1/messages` (Anthropic's API), validated by pydantic as in `wire`.

Knows types and bounds. Does not know what the values mean (`anthropic_requests`).
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from .wire import MAX_MESSAGES, Stops, Temperature, TopK, TopP, Whole, Wire


class Text(Wire):
    type: Literal["text"]
    text: str


class Thinking(Wire):
    """Reasoning of an earlier reply. Its signature is neither required nor checked."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinking(Wire):
    """Encrypted reasoning of another model: unreadable here, and ignored."""

    type: Literal["redacted_thinking"]


class ToolUse(Wire):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _blocks(content: Any) -> Any:
    """A plain string is short for one text block."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


_Texts: TypeAlias = Annotated[list[Text], Field(max_length=MAX_MESSAGES, fail_fast=True)]
Texts: TypeAlias = Annotated[_Texts, BeforeValidator(_blocks, json_schema_input_type=str | _Texts)]


class ToolResult(Wire):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None


Block: TypeAlias = Annotated[
    Text | Thinking | RedactedThinking | ToolUse | ToolResult, Field(discriminator="type")
]
_Content: TypeAlias = Annotated[list[Block], Field(max_length=MAX_MESSAGES, fail_fast=True)]
Content: TypeAlias = Annotated[_Content, BeforeValidator(_blocks, json_schema_input_type=str | _Content)]


class Turn(Wire):
    role: Literal["user", "assistant", "system"]
    content: Content


class Enabled(Wire):
    """budget_tokens: limit of reasoning tokens; then the answer follows."""

    type: Literal["enabled"]
    budget_tokens: Whole


class Adaptive(Wire):
    type: Literal["adaptive"]


class Disabled(Wire):
    type: Literal["disabled"]


class Tool(Wire):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(Wire):
    """name: the tool that must be called, for the type `tool`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Format(Wire):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Wire):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Format | None = None


class CountRequest(Wire):
    """`POST /v1/messages/count_tokens`, and what both routes have in common.

    thinking: if absent, the model reasons, up to the limit of `output_config.effort`.
    """

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Texts | None = None
    thinking: Annotated[Enabled | Adaptive | Disabled, Field(discriminator="type")] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest):
    """`POST /v1/messages`."""

    max_tokens: Whole
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    stop_sequences: Stops | None = None
