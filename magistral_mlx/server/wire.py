"""Request bodies of OpenAI's API, validated by pydantic.

Knows types and bounds. Does not know what a value means, or whether the model supports it (`requests`).
Unknown fields are ignored: clients send many that a local model has no use for (`user`, `store`,
`service_tier`).

A list is refused at its first mistake (`fail_fast`): a body has room for millions, and reporting them all
would take a minute and gigabytes.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

MAX_MESSAGES = 4096
MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16

Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Whole: TypeAlias = Annotated[int, Field(ge=1)]
Temperature: TypeAlias = Annotated[float, Field(ge=0)]
TopP: TypeAlias = Annotated[float, Field(gt=0, le=1)]
TopK: TypeAlias = Annotated[int, Field(ge=0)]
Stops: TypeAlias = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=MAX_STOPS, fail_fast=True)
]
Ids: TypeAlias = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class Wire(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class Part(Wire):
    """A part of a message's content; only text is supported."""

    type: str
    text: str | None = None


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: str | None = None


Messages: TypeAlias = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class StreamOptions(Wire):
    include_usage: bool | None = None


class Sampled(Wire):
    """What chat and plain completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Whole | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(max_length=1024)] | Stops | None = None  # empty: no stop string
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`.

    think_budget: limit of reasoning tokens, then the answer follows; overrides that of `reasoning_effort`.
    """

    messages: Messages
    max_completion_tokens: Whole | None = None
    reasoning_effort: Effort | None = None
    think_budget: Annotated[int, Field(ge=0)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionRequest(Sampled):
    """`POST /v1/completions`: continues a text as it stands; no template, no system prompt."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeRequest(Wire):
    """`POST /v1/tokenize`: either a text as it stands, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
