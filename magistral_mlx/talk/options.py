"""The options of one reply: the keyword arguments that `stream`, `ask` and the like share."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

from magistral_mlx.decoder.sampling import Sampling
from magistral_mlx.errors import SamplingError
from magistral_mlx.structured.shape import Schema
from magistral_mlx.text import tools

MAX_TOKENS = 40960
"""The model card's limit for one reply."""


class Plain(TypedDict, total=False):
    """The options of one reply; the defaults are the model card's or the checkpoint's.

    sampling: how ids are sampled (`Sampling()`: temperature 0.7, top_p 0.95).
    seed: the same seed gives the same reply; by default a random one, which `Reply.seed` has.
    max_tokens: of reasoning and answer together, 40960 by default; never more than the context has room for.
    think_budget: tokens of reasoning, after which it is closed at the next line or sentence; None: no limit.
    loop_guard: detect reasoning or an answer that repeats itself without end, and end it. Off by default: it
        misses some loops, and may mistake a table with a strict pattern for one.
    think: False leaves out the prompt that makes the model think: faster, and worse at hard questions.
    system: text placed before the checkpoint's system prompt.
    keep_thinking: keep earlier reasoning ("thinking" of an assistant's message) in the prompt, not only
        answers.
    speculate: speculative decoding: draft several ids and verify them in one forward pass, where that is
        measured to be faster; the reply to a seed is the same. Off by default, unless the model was loaded
        with a draft model. Never used for replies that are decoded together.
    stop: a string, or several, that ends the answer and is not part of it; reasoning may contain it.
    tools: functions that the model may call: `{"type": "function", "function": {"name", "description",
        "parameters"}}`, as in OpenAI's interface. Calls are in `Reply.tool_calls`.
    tool_choice: "auto": the model decides whether to call; "none": the tools are left out of the prompt;
        "required": it must call a tool; or the name of the tool that it must call.
    parallel_tool_calls: False ends a reply after its first call.
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
    """`Plain`, and the form of the answer.

    schema: a Pydantic model or another type, a JSON schema, or a `Regex`. The answer is constrained to it,
        the reasoning is free; `Reply.parsed` is the value. The schema is not put into the prompt: describe
        in the question what is wanted.
    """

    schema: Schema | None


_FLAGS = ("think", "loop_guard", "keep_thinking", "speculate", "parallel_tool_calls")


def check(given: Mapping[str, Any]) -> None:
    """Check the names, which Python does not check in `**options`, and the types that nothing else checks.

    Raises:
        SamplingError: an unknown name, or a wrong type.
    """
    if unknown := sorted(given.keys() - Options.__optional_keys__):
        known = ", ".join(sorted(Options.__optional_keys__))
        raise SamplingError(
            f"there is no option {unknown[0]!r}; the options are {known}; temperature, top_p and the like "
            "are part of sampling=Sampling(…)"
        )
    sampling, stop = given.get("sampling", Sampling()), given.get("stop", ())
    if not isinstance(sampling, Sampling):
        raise SamplingError(f"sampling is a Sampling, such as Sampling(temperature=0.7), found {sampling!r}")
    if not isinstance(stop, Sequence) or not all(
        isinstance(text, str) for text in cast("Sequence[Any]", stop)
    ):
        raise SamplingError(f"stop is a string, or a list of strings, found {stop!r}")
    for name in _FLAGS:
        if not isinstance(given.get(name, False), bool):
            raise SamplingError(f"{name} is True or False, found {given[name]!r}")


def offered(options: Options) -> list[dict[str, Any]]:
    """The definitions of the tools that a reply may call."""
    return tools.offered(options.get("tools") or (), options.get("tool_choice") or "auto")


def forced(options: Options) -> list[dict[str, Any]]:
    """The definitions of the tools of which a reply must call one; empty: it may answer."""
    return tools.forced(options.get("tools") or (), options.get("tool_choice") or "auto")
