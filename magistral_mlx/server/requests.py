"""OpenAI's requests → messages, prompts and options of the library; what it cannot do is refused.

Knows the request format and the library's options. Does not know HTTP, or how replies are generated.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

from magistral_mlx.chat import Magistral
from magistral_mlx.decoder.sampling import Sampling
from magistral_mlx.structured.grammar import Regex
from magistral_mlx.talk.options import MAX_TOKENS, Options
from magistral_mlx.text.tokenizer import Tokenizer

from .failures import RefusedError, unsupported
from .wire import ChatRequest, CompletionRequest, Effort, Message, Part, Sampled, TokenizeRequest

Dialogue: TypeAlias = list[dict[str, Any]]

EFFORTS: dict[Effort, int | None] = {"minimal": 256, "low": 1024, "medium": 8192, "high": None, "xhigh": None}
"""Limit of reasoning tokens for each effort; None: no limit. "none" turns the reasoning off."""
COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for a plain completion."""


def chat(request: ChatRequest, tokenizer: Tokenizer) -> tuple[Dialogue, Options]:
    """The messages for the model, and the options of its reply."""
    system, messages = dialogue(request.messages, tokenizer)
    options = _sampled(request)
    limit = request.max_completion_tokens or request.max_tokens or MAX_TOKENS
    budget = EFFORTS.get(request.reasoning_effort or "high")
    if request.logprobs:
        options["logprobs"] = request.top_logprobs or 0
    return messages, options | _tools(request) | _schema(request) | Options(
        max_tokens=limit,
        think=request.reasoning_effort != "none",
        think_budget=budget if request.think_budget is None else request.think_budget,
        system=system,
    )


def completion(request: CompletionRequest, tokenizer: Tokenizer) -> tuple[list[list[int]], Options]:
    """Prompts as ids, texts with the BOS id in front, and the options of their completions."""
    if request.suffix:
        raise unsupported("suffix", "suffix is not supported: the model can only continue a text")
    if request.echo and request.logprobs is not None:
        raise unsupported("logprobs", "a prompt has no logprobs here; ask for echo or for logprobs")
    if (request.best_of or 1) > 1:
        raise unsupported("best_of", "best_of is not supported; request n choices and pick one")
    options = _sampled(request)
    options["max_tokens"] = request.max_tokens or COMPLETION_TOKENS
    options["logprobs"] = request.logprobs
    return [_ids(prompt, tokenizer) for prompt in _prompts(request.prompt)], options


def echoes(request: CompletionRequest, tokenizer: Tokenizer) -> list[str]:
    """Per prompt, the text to put before its choices; empty if no echo was requested."""
    if not request.echo:
        return []
    return [p if isinstance(p, str) else tokenizer.decode(p) for p in _prompts(request.prompt)]


def tokens(request: TokenizeRequest, model: Magistral) -> list[int]:
    """The ids of a text, or of a chat's prompt."""
    if (request.prompt is None) == (request.messages is None):
        raise RefusedError(400, "expected either prompt or messages", param="prompt")
    if request.messages is not None:
        system, messages = dialogue(request.messages, model.tokenizer)
        return model.encode(messages, system=system)
    ids = model.tokenizer.encode(request.prompt or "")
    return [model.tokenizer.bos_id, *ids] if request.add_special_tokens else ids


def stops(request: Sampled) -> tuple[str, ...]:
    stop = request.stop or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def dialogue(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[str | None, Dialogue]:
    """The library's messages, and the text to place before the checkpoint's own system prompt.

    Clients that know Magistral send its think template in a system message, which is then used unchanged.
    Others send the system message they would send to any model: on its own, it would turn the reasoning off.
    """
    system = [_text(m, at) for at, m in enumerate(messages) if m.role in ("system", "developer")]
    own = any(map(tokenizer.has_think_template, system))
    kept = [
        _message(message, at)
        for at, message in enumerate(messages)
        if own or message.role not in ("system", "developer")
    ]
    before = "\n\n".join(text for text in system if text.strip())
    return (None if own else before or None), [message for message in kept if message]


def _message(message: Message, at: int) -> dict[str, Any]:
    """One message; empty if it has no content, such as a reply that was cut off before its answer."""
    text = _text(message, at)
    match message.role:
        case "assistant":
            parts: dict[str, Any] = {"thinking": message.reasoning_content or message.reasoning}
            parts |= {"content": text, "tool_calls": message.tool_calls}
            parts = {name: value for name, value in parts.items() if value}
            return parts and {"role": "assistant", **parts}
        case "tool":
            return {"role": "tool", "content": text, "tool_call_id": message.tool_call_id}
        case role:
            return {"role": "user" if role == "user" else "system", "content": text}


def _text(message: Message, at: int) -> str:
    if isinstance(message.content, list):
        return "".join(_part(part, at) for part in message.content)
    return message.content or ""


def _part(part: Part, at: int) -> str:
    if part.type != "text" or part.text is None:
        raise unsupported(f"messages.{at}.content", "only parts of the type text are supported")
    return part.text


def _sampled(request: Sampled) -> Options:
    """The options that chat and plain completions share: sampling, seed and stop strings."""
    for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
        if getattr(request, name):
            raise unsupported(name, f"{name} is not supported; repetition_penalty is")
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    options = Options(sampling=Sampling(**given), stop=stops(request))
    if request.seed is not None:
        options["seed"] = request.seed % 2**63
    return options


def _tools(request: ChatRequest) -> Options:
    """Tools and tool choice; the library validates the tools."""
    choice: Any = request.tool_choice
    if isinstance(choice, dict):
        match cast("dict[str, Any]", choice):
            case {"type": "function", "function": {"name": str(name)}}:
                choice = name
            case _:
                raise unsupported("tool_choice", "expected auto, none, required, or a function by its name")
    if not request.tools:
        if choice not in (None, "auto", "none"):
            raise RefusedError(400, "a tool_choice needs tools", param="tool_choice", code="invalid_value")
        return {}
    several = request.parallel_tool_calls is not False
    return {"tools": request.tools, "tool_choice": choice or "auto", "parallel_tool_calls": several}


def _schema(request: ChatRequest) -> Options:
    """The format of the answer as a schema; the library refuses one that it cannot enforce."""
    wanted: Any = request.response_format
    match wanted:
        case None | {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"schema": {"type": "object"}}
        case {"type": "json_schema", "json_schema": {"schema": schema}} if isinstance(schema, dict):
            return {"schema": cast("dict[str, Any]", schema)}
        case {"type": "regex", "pattern": str(pattern)}:
            return {"schema": Regex(pattern)}
        case _:
            message = "expected the type text, json_object, json_schema (a schema) or regex (a pattern)"
            raise RefusedError(400, message, param="response_format", code="invalid_value")


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    match prompt:
        case str():
            return [prompt]
        case [int(), *_]:
            return [prompt]  # pyright: ignore[reportReturnType]  # the first element shows that it is a list of ids
        case _:
            return prompt  # pyright: ignore[reportReturnType]  # a list of texts, or of lists of ids


def _ids(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if not prompt or not all(0 <= id_ < tokenizer.vocab_size for id_ in prompt):
        raise RefusedError(
            400, f"expected at least one id, each from 0 to {tokenizer.vocab_size - 1}", param="prompt"
        )
    return prompt
