"""Requests → the library's messages and options; its events → responses."""

from typing import Any

import pytest
from pydantic import ValidationError

from magistral_mlx import AnswerToken, Finished, Stats, ThinkToken, ToolCallToken
from magistral_mlx.decoder.sampling import Sampling
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.server import requests
from magistral_mlx.server.anthropic_wire import CountRequest
from magistral_mlx.server.failures import RefusedError
from magistral_mlx.server.rendering import Delta, RawText, SeparateReasoning, TaggedReasoning
from magistral_mlx.server.wire import ChatRequest, CompletionRequest, DetokenizeRequest, Wire
from magistral_mlx.text.tokenizer import Tokenizer

THINK_TEMPLATE = "Be wise.\n<think>\nso\n</think>\n"
USER = {"role": "user", "content": "48 + 37?"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DEMO)


def translate(tokenizer: Tokenizer, *messages: dict[str, Any], **fields: Any) -> tuple[list, Any]:
    return requests.chat(ChatRequest.model_validate({"messages": [*messages], **fields}), tokenizer)


def test_a_system_message_goes_before_the_checkpoints_prompt(tokenizer: Tokenizer):
    messages, options = translate(tokenizer, {"role": "system", "content": "Be brief."}, USER)
    assert (messages, options["system"]) == ([USER], "Be brief.")


def test_several_system_messages_are_joined(tokenizer: Tokenizer):
    developer = {
        "role": "developer",
        "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "x"}],
    }
    messages, options = translate(tokenizer, {"role": "system", "content": "A."}, USER, developer, USER)
    assert (messages, options["system"]) == ([USER, USER], "A.\n\nBe x")


def test_a_system_message_with_the_think_template_is_used_unchanged(tokenizer: Tokenizer):
    own = {"role": "system", "content": THINK_TEMPLATE}
    assert translate(tokenizer, own, USER)[0] == [own, USER]
    assert translate(tokenizer, own, USER)[1]["system"] is None


def test_assistant_messages_are_translated_in_each_of_their_forms(tokenizer: Tokenizer):
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages, _ = translate(
        tokenizer,
        USER,
        {"role": "assistant", "content": "85", "reasoning": "so"},
        USER,
        {"role": "assistant", "content": None, "reasoning_content": None},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"},
    )
    assert messages == [
        USER,
        {"role": "assistant", "thinking": "so", "content": "85"},
        USER,
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "abcdefghi"},
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"max_tokens": 40960, "think": True, "think_budget": None, "stop": (), "sampling": Sampling()}),
        ({"temperature": 0.0, "top_p": 0.5}, {"sampling": Sampling(temperature=0, top_p=0.5)}),
        ({"min_p": 0.1, "top_k": 3}, {"sampling": Sampling(min_p=0.1, top_k=3)}),
        ({"max_tokens": 20}, {"max_tokens": 20}),
        ({"max_tokens": 20, "max_completion_tokens": 30}, {"max_tokens": 30}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "y"]}, {"stop": ("x", "y")}),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"reasoning_effort": "none"}, {"think": False}),
        ({"reasoning_effort": "low"}, {"think": True, "think_budget": 1024}),
        ({"reasoning_effort": "high"}, {"think": True, "think_budget": None}),
        ({"reasoning_effort": "low", "think_budget": 3}, {"think_budget": 3}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 5}, {"logprobs": 5}),
        ({"response_format": {"type": "json_object"}}, {"schema": {"type": "object"}}),
    ],
    ids=str,
)
def test_options_are_translated(tokenizer: Tokenizer, fields: dict[str, Any], expected: dict[str, Any]):
    _, options = translate(tokenizer, USER, **fields)
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "f"}}, "f"),
    ],
)
def test_tool_choice_is_translated(tokenizer: Tokenizer, choice: object, expected: str):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    _, options = translate(tokenizer, USER, tools=tools, tool_choice=choice)
    assert (options["tools"], options["tool_choice"]) == (tools, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "allowed_tools"}},
        {"tools": [{}], "tool_choice": {"type": "custom", "custom": {"name": "f"}}},
        {"logit_bias": {"1": 100}},
        {"presence_penalty": 0.5},
    ],
)
def test_unsupported_requests_are_refused(tokenizer: Tokenizer, fields: dict[str, Any]):
    with pytest.raises(RefusedError):
        translate(tokenizer, USER, **fields)


def test_fields_without_effect_are_ignored(tokenizer: Tokenizer):
    fields = {
        "user": "me",
        "store": True,
        "logit_bias": {},
        "frequency_penalty": 0,
        "tools": [],
        "stop": None,
    }
    assert translate(tokenizer, USER, **fields)[0] == [USER]


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": "1"}, {"n": 1.5}, {"stream": 1}, {"temperature": "0"}, {"stop": [1]}, {"seed": True}],
    ids=str,
)
def test_field_types_are_strict(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"messages": [USER], **fields})


MANY = 10_000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": MANY * [{}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": MANY * [{}]}]}),
        (ChatRequest, {"messages": [{"role": "user", "tool_calls": MANY * [1]}]}),
        (ChatRequest, {"messages": [USER], "stop": MANY * [1]}),
        (ChatRequest, {"messages": [USER], "tools": MANY * [1]}),
        (CompletionRequest, {"prompt": MANY * [[]]}),
        (CompletionRequest, {"prompt": MANY * [None]}),
        (CompletionRequest, {"prompt": [MANY * ["x"]]}),
        (DetokenizeRequest, {"tokens": MANY * [-1]}),
        (CountRequest, {"messages": MANY * [{}]}),
        (CountRequest, {"messages": [{"role": "user", "content": MANY * [1]}]}),
        (CountRequest, {"messages": [USER], "system": MANY * [1]}),
        (CountRequest, {"messages": [USER], "tools": MANY * [1]}),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_only_a_few_of_many_errors_are_reported(kind: type[Wire], body: dict[str, Any]):
    """Reporting each takes time and memory, and a body can hold millions of them."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 10


EVENTS = [
    ThinkToken(text="so"),
    ThinkToken(text=" 85"),
    ThinkToken(text="", forced=True),
    AnswerToken(text="It is"),
    AnswerToken(text=" 85."),
    Finished(reason="stop", stats=Stats(answer_tokens=3)),
]


def test_separate_reasoning_is_not_in_the_text():
    deltas = [SeparateReasoning().render(event) for event in EVENTS]
    assert "".join(delta.thinking for delta in deltas) == "so 85"
    assert "".join(delta.text for delta in deltas) == "It is 85."


@pytest.mark.parametrize(
    ("events", "text"),
    [
        (EVENTS, "<think>\nso 85\n</think>\n\nIt is 85."),
        (EVENTS[3:], "It is 85."),
        (EVENTS[:1], "<think>\nso"),
        ([*EVENTS[:2], Finished(reason="length")], "<think>\nso 85"),
        ([*EVENTS[:2], EVENTS[-1]], "<think>\nso 85\n</think>\n\n"),
    ],
)
def test_tagged_reasoning_is_in_the_text(events: list[Any], text: str):
    rendering = TaggedReasoning()
    assert "".join(rendering.render(event).text for event in events) == text


def test_a_call_closes_the_reasoning():
    rendering, call = TaggedReasoning(), ToolCallToken(text="{", index=0, id="abcdefghi", name="f")
    assert [rendering.render(EVENTS[0]), rendering.render(call)][1] == Delta(text="\n</think>\n\n", call=call)


@pytest.mark.parametrize("stop", [(), ("x",), ("37",), ("8 + 3",), ("+", "4")])
def test_raw_text_is_verbatim_up_to_a_stop_string(tokenizer: Tokenizer, stop: tuple[str, ...]):
    text = "48 + 37 = 85 é€😀"
    ids, rendering, rendered = tokenizer.encode(text), RawText(tokenizer, stop), ""
    for event in [*(AnswerToken(text="", token_ids=(id_,)) for id_ in ids), Finished(reason="stop")]:
        rendered += rendering.render(event).text
    end = min((text.find(s) for s in stop if s in text), default=len(text))
    assert rendered == text[:end]
    assert rendering.stopped == (end < len(text))
