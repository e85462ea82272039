"""What can be set for one reply: the keywords that `stream`, `ask` and the like share."""

from collections.abc import Sequence
from typing import Any, TypedDict

from magistral_mlx.decoder.sampling import Sampling
from magistral_mlx.structured.shape import Schema
from magistral_mlx.text import tools

MAX_TOKENS = 40960
"""The model card's limit for one reply."""


class Plain(TypedDict, total=False):
    """What can be set for one reply; whatever is left out is the model card's or the checkpoint's.

    sampling: how ids are drawn (`Sampling()`: temperature 0.7, top_p 0.95).
    seed: the same seed gives the same reply; left out, a new one is drawn and kept in `Reply.seed`.
    max_tokens: of reasoning and answer together, 40960; never more than the context has room for.
    think_budget: tokens of reasoning, after which it is closed at the next line or sentence; None: no limit.
    loop_guard: notice reasoning or an answer that repeats itself, and end it. Off unless asked for: it
        misses some, and may take a table of a strict pattern for a loop.
    think: False leaves out the prompt that makes the model think: quicker, and worse at hard questions.
    system: placed before the checkpoint's system prompt.
    keep_thinking: earlier reasoning ("thinking" of an assistant's message) is read again, not only answers.
    speculate: guess several ids ahead and check them in one forward pass, where that is measured to be
        quicker; for a seed the reply is the same. Off, unless the model was loaded with a draft model.
        Several replies at once are always written without it.
    stop: a string, or several, that ends the answer and is not part of it; reasoning may contain it.
    tools: functions that the model may call: `{"type": "function", "function": {"name", "description",
        "parameters"}}`, as OpenAI has them. Calls are in `Reply.tool_calls`.
    tool_choice: "auto": the model calls or answers, as it likes; "none": the prompt does not hold the tools;
        "required": it has to call; or the name of the one that it has to call.
    parallel_tool_calls: False ends a reply after its first call, if it calls at all.
    logprobs: a number from 0 to 20: keep the log-probability of each id, and of that many likeliest ones, in
        `Reply.logprobs`.
    """

    sampling: Sampling
    seed: int | None
    max_tokens: int
    think: bool
    think_budget: int | None
    loop_guard: bool
    system: str | None
    keep_thinking: bool
    speculate: bool
    stop: str | Sequence[str]
    tools: tools.Tools | None
    tool_choice: str | None
    parallel_tool_calls: bool
    logprobs: int | None


class Options(Plain, total=False):
    """`Plain`, and what the answer is to be.

    schema: a Pydantic model or another type, a JSON schema, or a `Regex`. The answer is held to it, the
        reasoning is free; `Reply.parsed` is the value. The model is not told: say in the question what is
        wanted.
    """

    schema: Schema | None


def offered(options: Options) -> list[dict[str, Any]]:
    """The definitions of the tools that a reply may call."""
    return tools.offered(options.get("tools") or (), options.get("tool_choice") or "auto")


def forced(options: Options) -> list[dict[str, Any]]:
    """The definitions of the tools of which it has to call one."""
    return tools.forced(options.get("tools") or (), options.get("tool_choice") or "auto")
