"""Anthropic's API: the official client, the blocks and events it reads, and which requests are refused."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from anthropic import (
    Anthropic,
    AsyncAnthropic,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    RateLimitError,
)
from hypothesis import given
from hypothesis import strategies as st

from magistral_mlx import Reply, Sampling, Stats, ToolCall, ToolCallToken
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.server import anthropic_requests, requests
from magistral_mlx.server.anthropic_replies import SIGNATURE, MessageEncoder
from magistral_mlx.server.anthropic_wire import MessagesRequest
from magistral_mlx.server.failures import RefusedError
from magistral_mlx.server.rendering import Delta
from magistral_mlx.server.replies import Choice, ChoiceEnd
from magistral_mlx.server.safety import Rules
from magistral_mlx.text.tokenizer import Tokenizer
from tests.scripted import scripted
from tests.serving import HUB_ID, QUESTION, Running, until
from tests.text.test_toolcalls import ids_of

MESSAGES = "/v1/messages"
USER = {"role": "user", "content": QUESTION}
REQUEST: dict[str, Any] = {"model": "any", "max_tokens": 2000, "messages": [USER]}
GREEDY_REQUEST: dict[str, Any] = REQUEST | {"temperature": 0}
"""The body of an HTTP request."""
GREEDY_ARGUMENTS: dict[str, Any] = REQUEST | {"extra_body": {"temperature": 0}}
"""The same as arguments of the client, whose newer versions have no parameter for the temperature."""
WEATHER = {
    "name": "weather",
    "description": "Of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def client_of(server: Running, key: str = "EMPTY") -> Anthropic:
    return Anthropic(base_url=server.url, api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[Anthropic]:
    with client_of(served) as client:
        yield client


@pytest.fixture(scope="module")
def expected_reply(served: Running) -> Reply:
    """The library's reply to the same question."""
    return served.service.model.ask(QUESTION, sampling=Sampling(temperature=0))


def test_a_message_has_the_reasoning_and_the_answer(client: Anthropic, expected_reply: Reply):
    message = client.messages.create(**GREEDY_ARGUMENTS)
    thinking, text = message.content
    assert (thinking.type, thinking.thinking, thinking.signature) == (
        "thinking",
        expected_reply.thinking,
        SIGNATURE,
    )
    assert (text.type, text.text) == ("text", expected_reply.answer)
    assert (message.model, message.role, message.stop_reason) == (HUB_ID, "assistant", "end_turn")
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == expected_reply.stats.prompt_tokens
    assert usage.output_tokens == len(expected_reply.token_ids)
    assert usage.output_tokens_details
    assert usage.output_tokens_details.thinking_tokens == expected_reply.stats.thinking_tokens


def test_a_stream_builds_the_same_message(client: Anthropic):
    whole = client.messages.create(**GREEDY_ARGUMENTS)
    with client.messages.stream(**GREEDY_ARGUMENTS) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert [block.to_dict() for block in streamed.content] == [block.to_dict() for block in whole.content]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == ("end_turn", whole.usage.output_tokens)
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2


def test_stream_events_come_in_the_documented_order(served: Running, expected_reply: Reply):
    """Each has its name in the event and in the data."""
    response = served.post(MESSAGES, GREEDY_REQUEST | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [lines.split("\n") for lines in response.body.decode().replace("\r", "").strip().split("\n\n")]
    data = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [event["type"] for event in data]
    deltas = [event["delta"]["type"] for event in data if event["type"] == "content_block_delta"]
    kinds_of_delta = [kind for at, kind in enumerate(deltas) if kind not in deltas[:at]]
    assert kinds_of_delta == ["thinking_delta", "signature_delta", "text_delta"]
    assert [event["index"] for event in data if event["type"] == "content_block_start"] == [0, 1]
    assert data[0]["message"]["usage"]["input_tokens"] == expected_reply.stats.prompt_tokens
    assert data[0]["message"]["content"] == []


def test_the_async_client_streams_the_same_answer(served: Running, expected_reply: Reply):
    async def main() -> str:
        async with (
            AsyncAnthropic(base_url=served.url, api_key="EMPTY", max_retries=0) as client,
            client.messages.stream(**GREEDY_ARGUMENTS) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(main()) == expected_reply.answer


@pytest.mark.parametrize("stream", [False, True])
def test_stop_reason_and_stop_sequence_say_how_a_reply_ended(
    client: Anthropic, expected_reply: Reply, stream: bool
):
    def stop_of(**changes: Any) -> tuple[str | None, str | None]:
        if stream:
            with client.messages.stream(**GREEDY_ARGUMENTS | changes) as message_stream:
                message = message_stream.get_final_message()
        else:
            message = client.messages.create(**GREEDY_ARGUMENTS | changes)
        return message.stop_reason, message.stop_sequence

    assert stop_of(max_tokens=3) == ("max_tokens", None)
    stop_string = expected_reply.answer[1:3]
    assert stop_of(stop_sequences=["never said", stop_string]) == ("stop_sequence", stop_string)


def test_thinking_can_be_disabled_limited_or_left_free(client: Anthropic, expected_reply: Reply):
    disabled = client.messages.create(**GREEDY_ARGUMENTS, thinking={"type": "disabled"})
    assert [block.type for block in disabled.content] == ["text"]
    limited = client.messages.create(**GREEDY_ARGUMENTS, thinking={"type": "enabled", "budget_tokens": 3})
    assert limited.content[0].type == "thinking"
    assert expected_reply.thinking.startswith(limited.content[0].thinking)
    assert len(limited.content[0].thinking) < len(expected_reply.thinking)
    adaptive = client.messages.create(**GREEDY_ARGUMENTS, thinking={"type": "adaptive"})
    assert [block.type for block in adaptive.content] == ["thinking", "text"]


def test_the_answer_follows_a_json_schema(client: Anthropic):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}}
    schema |= {"required": ["n"], "additionalProperties": False}
    message = client.messages.create(
        **GREEDY_ARGUMENTS, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    assert json.loads(message.content[-1].text)["n"] in range(10)  # type: ignore[union-attr]


def test_count_tokens_gives_the_length_of_the_prompt(client: Anthropic, served: Running):
    counted = client.messages.count_tokens(model="any", messages=[USER], system="Be brief.")  # type: ignore[list-item]
    assert counted.input_tokens == len(served.service.model.encode(QUESTION, system="Be brief."))


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_become_tool_use_blocks(tool_calling_server: Running, stream: bool):
    with client_of(tool_calling_server) as client:
        if stream:
            with client.messages.stream(**GREEDY_ARGUMENTS, tools=[WEATHER]) as message_stream:
                message = message_stream.get_final_message()
        else:
            message = client.messages.create(**GREEDY_ARGUMENTS, tools=[WEATHER])
    thinking, text, paris, _ = message.content
    assert message.stop_reason == "tool_use"
    assert (thinking.thinking, text.text) == ("Two cities.", "I'll look.")  # type: ignore[union-attr]
    assert (paris.type, paris.id, paris.name) == ("tool_use", "abcDEF123", "weather")  # type: ignore[union-attr]
    assert paris.input == {"city": "Paris"}  # type: ignore[union-attr]


def test_tool_results_are_accepted_in_the_next_request(tool_calling_server: Running):
    with client_of(tool_calling_server) as client:
        arguments = GREEDY_ARGUMENTS | {
            "tools": [WEATHER],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        }
        message = client.messages.create(**arguments)
        [call] = [block for block in message.content if block.type == "tool_use"]
        results = [
            {"type": "text", "text": "And?"},
            {"type": "tool_result", "tool_use_id": call.id, "content": "21", "is_error": False},
        ]
        history = [
            USER,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": results},
        ]
        again = client.messages.create(**arguments | {"messages": history})
        assert again.usage.input_tokens > 0
        with pytest.raises(BadRequestError, match="result of each tool call"):
            client.messages.create(**arguments | {"messages": [*history[:2], USER]})


def test_a_truncated_tool_call_is_not_reported_as_a_call(tiny_tokenizer: Callable[[str], Tokenizer]):
    """The beginning of the call was streamed; the stop reason says that there is no call to run."""
    tokenizer = tiny_tokenizer("v11")
    truncated = ids_of(tokenizer, 'Look.[TOOL_CALLS]weather[ARGS]{"city": "Pa')
    with scripted(tokenizer, truncated) as model, Running(model) as server, client_of(server) as client:
        with client.messages.stream(**GREEDY_ARGUMENTS, tools=[WEATHER]) as message_stream:
            message = message_stream.get_final_message()
        whole = client.messages.create(**GREEDY_ARGUMENTS, tools=[WEATHER])
    assert message.stop_reason == whole.stop_reason == "end_turn"
    assert [block.type for block in message.content] == ["text", "tool_use", "text"]
    assert [block.type for block in whole.content] == ["text"]
    assert message.content[2].text == 'weather[ARGS]{"city": "Pa' or "Pa" in message.content[2].text  # type: ignore[union-attr]


def test_errors_reach_the_client_as_its_own_exceptions(served: Running, client: Anthropic):
    with pytest.raises(BadRequestError, match="max_tokens") as caught:
        client.messages.create(**GREEDY_ARGUMENTS | {"max_tokens": 0})
    assert caught.value.type == "invalid_request_error"
    picture = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    with pytest.raises(BadRequestError, match=r"messages\.0\.content\.0: .*'image'"):
        client.messages.create(**GREEDY_ARGUMENTS | {"messages": [{"role": "user", "content": [picture]}]})
    with pytest.raises(BadRequestError, match="context"):
        client.messages.create(**GREEDY_ARGUMENTS | {"messages": [{"role": "user", "content": "9 " * 9000}]})
    with pytest.raises(BadRequestError, match="last message"):
        client.messages.create(
            **GREEDY_ARGUMENTS | {"messages": [USER, {"role": "assistant", "content": "It is"}]}
        )
    with pytest.raises(NotFoundError) as not_found:
        client.post("/v1/messages/batches", body={}, cast_to=object)
    assert not_found.value.type == "not_found_error"
    with (
        Running(served.service.model, rules=Rules(key="right", body_bytes=1000)) as server_with_key,
        client_of(server_with_key, "wrong") as wrong_key_client,
        client_of(server_with_key, "right") as right_key_client,
    ):
        with pytest.raises(AuthenticationError) as unauthorized:
            wrong_key_client.messages.create(**GREEDY_ARGUMENTS)
        assert unauthorized.value.type == "authentication_error"
        assert (
            right_key_client.messages.create(**GREEDY_ARGUMENTS | {"max_tokens": 1}).stop_reason
            == "max_tokens"
        )
        assert (
            server_with_key.post(MESSAGES, b" " * 2000, **{"x-api-key": "right"}).json["error"]["type"]
            == "request_too_large"
        )


def test_a_full_queue_is_a_rate_limit_error(served: Running):
    with (
        Running(served.service.model, running=1, waiting=0) as one_slot_server,
        client_of(one_slot_server) as client,
    ):
        endless = REQUEST | {"extra_body": {"temperature": 50, "top_p": 1}}
        with client.messages.stream(**endless), pytest.raises(RateLimitError) as caught:
            client.messages.create(**GREEDY_ARGUMENTS)
        assert caught.value.type == "rate_limit_error"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        until(lambda: one_slot_server.idle)


def test_an_error_during_a_stream_is_sent_as_an_error_event(served: Running, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError(QUESTION)

    monkeypatch.setattr(served.service.metrics, "replied", fail)
    last_event = (
        served.post(MESSAGES, GREEDY_REQUEST | {"stream": True}).body.decode().strip().split("\n\n")[-1]
    )
    name, data = last_event.replace("\r", "").split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "api_error"
    assert QUESTION not in data
    until(lambda: served.idle)


DELTAS = {"thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text")}
DELTAS |= {"tool_use": ("input_json_delta", "partial_json")}


def blocks_of_events(body: bytes) -> list[tuple[str, str]]:
    """The type and content of each block; checks the API's rule that only one is open at a time."""
    blocks: list[tuple[str, str]] = []
    is_open = False
    for event in (json.loads(lines.split(b"\ndata: ")[1]) for lines in body.strip().split(b"\n\n") if lines):
        match event["type"]:
            case "content_block_start":
                assert (is_open, event["index"]) == (False, len(blocks))
                blocks.append((event["content_block"]["type"], ""))
                is_open = True
            case "content_block_delta":
                assert (is_open, event["index"]) == (True, len(blocks) - 1)
                (kind, text), delta = blocks[-1], event["delta"]
                name, field = DELTAS[kind]
                if delta["type"] != "signature_delta":
                    assert delta["type"] == name
                    blocks[-1] = kind, text + delta[field]
            case "content_block_stop":
                assert (is_open, event["index"]) == (True, len(blocks) - 1)
                is_open = False
            case _:
                assert not is_open
    return blocks


TEXTS = st.text(st.sampled_from("ab {é😀\n"), min_size=1, max_size=3)
DELTA_LISTS = st.lists(
    st.one_of(
        TEXTS.map(lambda text: Delta(text=text)),
        TEXTS.map(lambda text: Delta(thinking=text)),
        st.builds(lambda text, before: Delta(text=before, call=call_start(text)), TEXTS, st.just("") | TEXTS),
        st.builds(lambda text: Delta(call=ToolCallToken(text=text, index=0)), TEXTS),
    )
)


def call_start(text: str) -> ToolCallToken:
    return ToolCallToken(text=text, index=0, id="abcdefghi", name="f")


@given(DELTA_LISTS)
def test_blocks_hold_every_delta_in_order(deltas: list[Delta]):
    deltas = [  # a call is continued only where one is open
        delta
        for at, delta in enumerate(deltas)
        if not delta.call or delta.call.name or (at and deltas[at - 1].call and deltas[at - 1].call.name)
    ]
    expected: list[tuple[str, str]] = []
    for delta in deltas:
        for kind, text in (("thinking", delta.thinking), ("text", delta.text)):
            if text and expected and expected[-1][0] == kind:
                expected[-1] = kind, expected[-1][1] + text
            elif text:
                expected.append((kind, text))
        if delta.call and delta.call.name:
            expected.append(("tool_use", delta.call.text))
        elif delta.call:
            expected[-1] = "tool_use", expected[-1][1] + delta.call.text
    encoder = MessageEncoder("demo", prompt_tokens=1)
    body = b"".join(encoder.piece(0, delta) for delta in deltas) + encoder.ending(
        0, ChoiceEnd("stop", Stats())
    )
    assert blocks_of_events(body) == expected


def test_a_lone_surrogate_in_the_arguments_is_kept():
    """It is valid JSON, but not valid Unicode."""
    call = ToolCall(id="abcdefghi", name="f", arguments='{"a": "\\ud800"}')
    choice = Choice([], ChoiceEnd("tool_calls", Stats(), (call,)))
    [block] = json.loads(MessageEncoder("demo", prompt_tokens=1).whole([choice]))["content"]
    assert block["input"] == {"a": "\ud800"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DEMO)


def translate(tokenizer: Tokenizer, **fields: Any) -> tuple[list, Any]:
    request = MessagesRequest.model_validate(GREEDY_REQUEST | fields)
    return requests.chat(anthropic_requests.chat(request), tokenizer)


def test_blocks_become_messages(tokenizer: Tokenizer):
    blocks: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "so", "signature": "x"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True, "content": "no"},
        {"type": "text", "text": "Again."},
    ]
    messages, options = translate(
        tokenizer,
        system=[
            {"type": "text", "text": "A.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "B."},
        ],
        messages=[USER, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}],
    )
    call = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert messages == [
        USER,
        {"role": "assistant", "thinking": "so", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "Error: no", "tool_call_id": "toolu_1"},
        {"role": "user", "content": "Again."},
    ]
    assert options["system"] == "A.\n\nB."


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"max_tokens": 2000, "think": True, "think_budget": None, "stop": ()}),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, {"think": True, "think_budget": 5}),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, {"think": False}),
        ({"output_config": {"effort": "low"}}, {"think_budget": 1024}),
        ({"output_config": {"effort": "max"}}, {"think_budget": None}),
        ({"stop_sequences": ["x", "y"]}, {"stop": ("x", "y")}),
        ({"tools": [WEATHER]}, {"tool_choice": "auto", "parallel_tool_calls": True}),
        ({"tools": [WEATHER], "tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
        ({"tools": [WEATHER], "tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}},
            {"tool_choice": "weather"},
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
    ],
    ids=str,
)
def test_options_are_translated(tokenizer: Tokenizer, fields: dict[str, Any], expected: dict[str, Any]):
    _, options = translate(tokenizer, **fields)
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": {"type": "any"}},
        {"tools": [WEATHER], "tool_choice": {"type": "tool"}},
        {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        {"messages": [{"role": "system", "content": [{"type": "redacted_thinking", "data": "x"}]}, USER]},
    ],
    ids=str,
)
def test_impossible_requests_are_refused(tokenizer: Tokenizer, fields: dict[str, Any]):
    with pytest.raises(RefusedError):
        translate(tokenizer, **fields)
