"""Anthropic's API: the official client, the blocks and events it reads, and what is refused."""

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
PLAIN: dict[str, Any] = {"model": "any", "max_tokens": 2000, "messages": [USER]}
ASK: dict[str, Any] = PLAIN | {"temperature": 0}
"""As in the HTTP body."""
ASKED: dict[str, Any] = PLAIN | {"extra_body": {"temperature": 0}}
"""The same for the client, whose newer versions have no parameter for it."""
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
def said(served: Running) -> Reply:
    """The library's reply to the same question."""
    return served.service.model.ask(QUESTION, sampling=Sampling(temperature=0))


def test_a_message_has_the_reasoning_and_the_answer(client: Anthropic, said: Reply):
    message = client.messages.create(**ASKED)
    thinking, text = message.content
    assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", said.thinking, SIGNATURE)
    assert (text.type, text.text) == ("text", said.answer)
    assert (message.model, message.role, message.stop_reason) == (HUB_ID, "assistant", "end_turn")
    used = message.usage
    assert used.input_tokens + (used.cache_read_input_tokens or 0) == said.stats.prompt_tokens
    assert used.output_tokens == len(said.token_ids)
    assert used.output_tokens_details
    assert used.output_tokens_details.thinking_tokens == said.stats.thinking_tokens


def test_a_stream_builds_the_same_message(client: Anthropic):
    whole = client.messages.create(**ASKED)
    with client.messages.stream(**ASKED) as stream:
        kinds = [event.type for event in stream]
        built = stream.get_final_message()
    assert [block.to_dict() for block in built.content] == [block.to_dict() for block in whole.content]
    assert (built.stop_reason, built.usage.output_tokens) == ("end_turn", whole.usage.output_tokens)
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2


def test_the_events_themselves(served: Running, said: Reply):
    """In the order that the API promises, each with its name in the event and in the data."""
    told = served.post(MESSAGES, ASK | {"stream": True})
    assert told.headers["content-type"].startswith("text/event-stream")
    events = [lines.split("\n") for lines in told.body.decode().replace("\r", "").strip().split("\n\n")]
    data = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [one["type"] for one in data]
    deltas = [one["delta"]["type"] for one in data if one["type"] == "content_block_delta"]
    once = [kind for at, kind in enumerate(deltas) if kind not in deltas[:at]]
    assert once == ["thinking_delta", "signature_delta", "text_delta"]
    assert [one["index"] for one in data if one["type"] == "content_block_start"] == [0, 1]
    assert data[0]["message"]["usage"]["input_tokens"] == said.stats.prompt_tokens
    assert data[0]["message"]["content"] == []


def test_the_async_client(served: Running, said: Reply):
    async def main() -> str:
        async with (
            AsyncAnthropic(base_url=served.url, api_key="EMPTY", max_retries=0) as client,
            client.messages.stream(**ASKED) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(main()) == said.answer


@pytest.mark.parametrize("stream", [False, True])
def test_how_a_reply_ended(client: Anthropic, said: Reply, stream: bool):
    def ended(**asked: Any) -> tuple[str | None, str | None]:
        if stream:
            with client.messages.stream(**ASKED | asked) as told:
                message = told.get_final_message()
        else:
            message = client.messages.create(**ASKED | asked)
        return message.stop_reason, message.stop_sequence

    assert ended(max_tokens=3) == ("max_tokens", None)
    piece = said.answer[1:3]
    assert ended(stop_sequences=["never said", piece]) == ("stop_sequence", piece)


def test_how_it_thinks(client: Anthropic, said: Reply):
    quick = client.messages.create(**ASKED, thinking={"type": "disabled"})
    assert [block.type for block in quick.content] == ["text"]
    short = client.messages.create(**ASKED, thinking={"type": "enabled", "budget_tokens": 3})
    assert short.content[0].type == "thinking"
    assert said.thinking.startswith(short.content[0].thinking)
    assert len(short.content[0].thinking) < len(said.thinking)
    free = client.messages.create(**ASKED, thinking={"type": "adaptive"})
    assert [block.type for block in free.content] == ["thinking", "text"]


def test_a_schema(client: Anthropic):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}}
    schema |= {"required": ["n"], "additionalProperties": False}
    asked = client.messages.create(
        **ASKED, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    assert json.loads(asked.content[-1].text)["n"] in range(10)  # type: ignore[union-attr]


def test_tokens_are_counted(client: Anthropic, served: Running):
    counted = client.messages.count_tokens(model="any", messages=[USER], system="Be brief.")  # type: ignore[list-item]
    assert counted.input_tokens == len(served.service.model.encode(QUESTION, system="Be brief."))


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(caller: Running, stream: bool):
    with client_of(caller) as client:
        if stream:
            with client.messages.stream(**ASKED, tools=[WEATHER]) as told:
                message = told.get_final_message()
        else:
            message = client.messages.create(**ASKED, tools=[WEATHER])
    thinking, text, paris, _ = message.content
    assert message.stop_reason == "tool_use"
    assert (thinking.thinking, text.text) == ("Two cities.", "I'll look.")  # type: ignore[union-attr]
    assert (paris.type, paris.id, paris.name) == ("tool_use", "abcDEF123", "weather")  # type: ignore[union-attr]
    assert paris.input == {"city": "Paris"}  # type: ignore[union-attr]


def test_results_go_back_in(caller: Running):
    with client_of(caller) as client:
        asked = ASKED | {
            "tools": [WEATHER],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        }
        message = client.messages.create(**asked)
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
        again = client.messages.create(**asked | {"messages": history})
        assert again.usage.input_tokens > 0
        with pytest.raises(BadRequestError, match="result of each tool call"):
            client.messages.create(**asked | {"messages": [*history[:2], USER]})


def test_a_call_that_breaks_off_is_no_call(tiny_tokenizer: Callable[[str], Tokenizer]):
    """A preview of the call was streamed; the stop reason says that there is nothing to run."""
    tokenizer = tiny_tokenizer("v11")
    broken = ids_of(tokenizer, 'Look.[TOOL_CALLS]weather[ARGS]{"city": "Pa')
    with scripted(tokenizer, broken) as model, Running(model) as server, client_of(server) as client:
        with client.messages.stream(**ASKED, tools=[WEATHER]) as told:
            message = told.get_final_message()
        whole = client.messages.create(**ASKED, tools=[WEATHER])
    assert message.stop_reason == whole.stop_reason == "end_turn"
    assert [block.type for block in message.content] == ["text", "tool_use", "text"]
    assert [block.type for block in whole.content] == ["text"]
    assert message.content[2].text == 'weather[ARGS]{"city": "Pa' or "Pa" in message.content[2].text  # type: ignore[union-attr]


def test_mistakes_are_the_clients_own_errors(served: Running, client: Anthropic):
    with pytest.raises(BadRequestError, match="max_tokens") as told:
        client.messages.create(**ASKED | {"max_tokens": 0})
    assert told.value.type == "invalid_request_error"
    picture = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    with pytest.raises(BadRequestError, match=r"messages\.0\.content\.0: .*'image'"):
        client.messages.create(**ASKED | {"messages": [{"role": "user", "content": [picture]}]})
    with pytest.raises(BadRequestError, match="context"):
        client.messages.create(**ASKED | {"messages": [{"role": "user", "content": "9 " * 9000}]})
    with pytest.raises(BadRequestError, match="last message"):
        client.messages.create(**ASKED | {"messages": [USER, {"role": "assistant", "content": "It is"}]})
    with pytest.raises(NotFoundError) as missing:
        client.post("/v1/messages/batches", body={}, cast_to=object)
    assert missing.value.type == "not_found_error"
    with (
        Running(served.service.model, rules=Rules(key="right", body_bytes=1000)) as locked,
        client_of(locked, "wrong") as stranger,
        client_of(locked, "right") as friend,
    ):
        with pytest.raises(AuthenticationError) as locked_out:
            stranger.messages.create(**ASKED)
        assert locked_out.value.type == "authentication_error"
        assert friend.messages.create(**ASKED | {"max_tokens": 1}).stop_reason == "max_tokens"
        assert (
            locked.post(MESSAGES, b" " * 2000, **{"x-api-key": "right"}).json["error"]["type"]
            == "request_too_large"
        )


def test_a_full_queue(served: Running):
    with Running(served.service.model, running=1, waiting=0) as narrow, client_of(narrow) as client:
        endless = PLAIN | {"extra_body": {"temperature": 50, "top_p": 1}}
        with client.messages.stream(**endless), pytest.raises(RateLimitError) as told:
            client.messages.create(**ASKED)
        assert told.value.type == "rate_limit_error"
        assert int(told.value.response.headers["retry-after"]) >= 1
        until(lambda: narrow.idle)


def test_an_error_in_mid_stream(served: Running, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> None:
        raise RuntimeError(QUESTION)

    monkeypatch.setattr(served.service.metrics, "replied", fails)
    told = served.post(MESSAGES, ASK | {"stream": True}).body.decode().strip().split("\n\n")[-1]
    name, data = told.replace("\r", "").split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "api_error"
    assert QUESTION not in data
    until(lambda: served.idle)


DELTAS = {"thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text")}
DELTAS |= {"tool_use": ("input_json_delta", "partial_json")}


def built(told: bytes) -> list[tuple[str, str]]:
    """The type and content of each block, by the API's rules: one at a time is open, and grows."""
    blocks: list[tuple[str, str]] = []
    is_open = False
    for event in (json.loads(lines.split(b"\ndata: ")[1]) for lines in told.strip().split(b"\n\n") if lines):
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
HEARD = st.lists(
    st.one_of(
        TEXTS.map(lambda text: Delta(text=text)),
        TEXTS.map(lambda text: Delta(thinking=text)),
        st.builds(lambda text, before: Delta(text=before, call=call_piece(text)), TEXTS, st.just("") | TEXTS),
        st.builds(lambda text: Delta(call=ToolCallToken(text=text, index=0)), TEXTS),
    )
)


def call_piece(text: str) -> ToolCallToken:
    return ToolCallToken(text=text, index=0, id="abcdefghi", name="f")


@given(HEARD)
def test_whatever_is_said_is_in_blocks(deltas: list[Delta]):
    deltas = [  # a call is continued only where one is open
        one
        for at, one in enumerate(deltas)
        if not one.call or one.call.name or (at and deltas[at - 1].call and deltas[at - 1].call.name)
    ]
    expected: list[tuple[str, str]] = []
    for one in deltas:
        for kind, text in (("thinking", one.thinking), ("text", one.text)):
            if text and expected and expected[-1][0] == kind:
                expected[-1] = kind, expected[-1][1] + text
            elif text:
                expected.append((kind, text))
        if one.call and one.call.name:
            expected.append(("tool_use", one.call.text))
        elif one.call:
            expected[-1] = "tool_use", expected[-1][1] + one.call.text
    encoder = MessageEncoder("demo", prompt_tokens=1)
    told = b"".join(encoder.piece(0, one) for one in deltas) + encoder.ending(0, ChoiceEnd("stop", Stats()))
    assert built(told) == expected


def test_half_a_surrogate_pair_in_arguments():
    """It is valid JSON, but not valid Unicode."""
    call = ToolCall(id="abcdefghi", name="f", arguments='{"a": "\\ud800"}')
    choice = Choice([], ChoiceEnd("tool_calls", Stats(), (call,)))
    [block] = json.loads(MessageEncoder("demo", prompt_tokens=1).whole([choice]))["content"]
    assert block["input"] == {"a": "\ud800"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DEMO)


def translate(tokenizer: Tokenizer, **fields: Any) -> tuple[list, Any]:
    request = MessagesRequest.model_validate(ASK | fields)
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
    said, options = translate(
        tokenizer,
        system=[
            {"type": "text", "text": "A.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "B."},
        ],
        messages=[USER, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}],
    )
    call = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert said == [
        USER,
        {"role": "assistant", "thinking": "so", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "Error: no", "tool_call_id": "toolu_1"},
        {"role": "user", "content": "Again."},
    ]
    assert options["system"] == "A.\n\nB."


@pytest.mark.parametrize(
    ("asked", "meant"),
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
def test_options(tokenizer: Tokenizer, asked: dict[str, Any], meant: dict[str, Any]):
    _, options = translate(tokenizer, **asked)
    assert {name: options[name] for name in meant} == meant


@pytest.mark.parametrize(
    "wrong",
    [
        {"tool_choice": {"type": "any"}},
        {"tools": [WEATHER], "tool_choice": {"type": "tool"}},
        {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        {"messages": [{"role": "system", "content": [{"type": "redacted_thinking", "data": "x"}]}, USER]},
    ],
    ids=str,
)
def test_what_cannot_be_is_said(tokenizer: Tokenizer, wrong: dict[str, Any]):
    with pytest.raises(RefusedError):
        translate(tokenizer, **wrong)
