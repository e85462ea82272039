"""Forced tool calls: whatever the logits, the reply has calls of offered tools."""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import mlx.core as mx
import pytest

from magistral_mlx import PromptError, Sampling, SchemaError
from magistral_mlx.chat import Magistral
from magistral_mlx.text.tokenizer import Tokenizer
from tests.scripted import Script, scripted
from tests.text.test_toolcalls import ids_of
from tests.text.test_tools import PARIS, TOOLS
from tests.tokenizers import VERSIONS

Open = Callable[[str], Tokenizer]
PLACE = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Zürich", 'a "b"']},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "maxItems": 3},
    },
    "required": ["city"],
    "$defs": {"day": {"type": "integer", "minimum": 0, "maximum": 31}},
}
BOUND = [{"name": "weather", "parameters": PLACE}, {"name": "time-in_2", "parameters": {}}]


class Noise(Script):
    """Follows the script, then has random logits, different at each position."""

    def logits(self, h: mx.array) -> mx.array:
        position = int(h[0, -1, 0].item())
        if position < len(self.ids):
            return super().logits(h)
        key = mx.random.key(position)
        return 6 * mx.random.normal((1, 1, self.tokenizer.vocab_size), key=key)


def noisy(tokenizer: Tokenizer, start: str) -> Magistral:
    model = scripted(tokenizer, [], max_context=20_000)
    model._model = Noise(ids_of(tokenizer, start), tokenizer, 0.0)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("choice", ["required", "weather", "time-in_2"])
def test_random_logits_make_valid_calls(tiny_tokenizer: Open, version: str, choice: str):
    tokenizer = tiny_tokenizer(version)
    tag = "[THINK]" if tokenizer.think_ids else "<think>"
    for start, think in ((f"{tag}Hm", True), ("", False)):
        with noisy(tokenizer, start) as model:
            for seed in range(1, 2):
                reply = model.ask(
                    "a",
                    tools=BOUND,
                    tool_choice=choice,
                    think=think,
                    seed=seed,
                    think_budget=4,
                    max_tokens=3000,
                )
                assert reply.finish_reason == "tool_calls"
                assert 1 <= len(reply.tool_calls) <= 8
                assert reply.answer == ""
                for call in reply.tool_calls:
                    check(call.name, json.loads(call.arguments), choice)


def check(name: str, arguments: Any, choice: str) -> None:
    assert choice in (name, "required")
    if name == "weather":
        jsonschema.validate(arguments, {**PLACE, "additionalProperties": False})
    else:
        assert (name, arguments) == ("time-in_2", {})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("before", ["", "<think>Hm", "<think>Hm</thi", "<think>Hm.\n</think>\n\n"])
def test_models_own_call_is_not_changed(tiny_tokenizer: Open, version: str, before: str):
    """A call that the model makes by itself, at any point of the reply, is not changed."""
    tokenizer = tiny_tokenizer(version)
    if tokenizer.think_ids:
        before = before.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")
    call_text = f"[TOOL_CALLS]weather[ARGS]{PARIS}"
    if version == "v11":
        call_text = f"[TOOL_CALLS]weather[CALL_ID]abcDEF123[ARGS]{PARIS}"
    if version == "v7":
        call_text = f'[TOOL_CALLS][{{"name": "weather", "arguments": {PARIS}}}]'
    ids = ids_of(tokenizer, before + call_text)
    with scripted(tokenizer, ids) as model:
        for choice in ("required", "weather", "auto"):
            reply = model.ask("a", tools=TOOLS, tool_choice=choice, sampling=Sampling(temperature=0))
            assert list(reply.token_ids) == [*ids, tokenizer.eos_id]
            assert [(call.name, call.arguments) for call in reply.tool_calls] == [("weather", PARIS)]
        reply = model.ask("a", tools=TOOLS, tool_choice="time", max_tokens=300)
        assert {call.name for call in reply.tool_calls} == {"time"}


def test_schema_with_tools_gives_a_call_or_an_answer(tiny_tokenizer: Open):
    """Either a call or an answer of the schema."""
    tokenizer, schema = tiny_tokenizer("v11"), {"enum": ["sunny", "rainy"]}
    for text, n_calls in ((f"[TOOL_CALLS]weather[ARGS]{PARIS}", 1), ('"rainy"', 0)):
        with scripted(tokenizer, ids_of(tokenizer, f"<think>Hm</think>\n\n{text}")) as model:
            reply = model.stream("a", tools=TOOLS, schema=schema).drain()
            assert len(reply.tool_calls) == n_calls
            if not n_calls:
                assert reply.parsed == "rainy"
    with noisy(tokenizer, "<think>") as model:
        for seed in range(4):
            reply = model.stream("a", tools=BOUND, schema=schema, seed=seed, think_budget=2).drain()
            assert reply.tool_calls or reply.parsed in ("sunny", "rainy")


def test_forced_calls_are_not_drafted(tiny_tokenizer: Open):
    with noisy(tiny_tokenizer("v11"), "<think>") as model:
        plain, drafted = (
            model.ask("a", tools=BOUND, tool_choice="required", seed=1, think_budget=2, speculate=speculate)
            for speculate in (False, True)
        )
    assert drafted.tool_calls
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.tokens_per_pass == plain.stats.tokens_per_pass


def test_impossible_tool_choices_are_refused(tiny_tokenizer: Open):
    with scripted(tiny_tokenizer("v11"), "a") as model:
        for choice in ("required", "weather"):
            with pytest.raises(PromptError, match=r"found '\w+' and the tools \[\]"):
                model.stream("a", tool_choice=choice)
        unsupported = [
            {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}}
        ]
        with pytest.raises(SchemaError):
            model.stream("a", tools=unsupported, tool_choice="f")
