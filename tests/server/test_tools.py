"""Tool calls over HTTP, mostly from a scripted model."""

import json

import pytest
from openai import OpenAI

from tests.serving import ASK, Running

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
QUESTION = {"role": "user", "content": "Paris, Rome?"}


@pytest.fixture(scope="module")
def client(tool_calling_server: Running) -> OpenAI:
    return OpenAI(base_url=f"{tool_calling_server.url}/v1", api_key="EMPTY", max_retries=0)


def test_tool_calls_are_returned(client: OpenAI):
    done = client.chat.completions.create(model="any", messages=[QUESTION], tools=TOOLS)  # type: ignore[arg-type]
    [choice] = done.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I'll look."
    assert choice.message.tool_calls
    called = [(c.id, c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]  # type: ignore[union-attr]
    assert called == [("abcDEF123", "weather", {"city": "Paris"}), ("000000001", "weather", {"city": "Rome"})]


def test_tool_calls_are_streamed_in_pieces(client: OpenAI):
    with client.chat.completions.stream(model="any", messages=[QUESTION], tools=TOOLS) as stream:  # type: ignore[arg-type]
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        message = stream.get_final_completion().choices[0].message
    assert len(pieces) > 4
    assert [call.function.arguments for call in message.tool_calls or ()] == [
        '{"city": "Paris"}',
        '{"city": "Rome"}',
    ]
    assert message.content == "I'll look."


def test_tool_results_are_accepted_in_the_next_request(tool_calling_server: Running, client: OpenAI):
    done = client.chat.completions.create(model="any", messages=[QUESTION], tools=TOOLS)  # type: ignore[arg-type]
    message = done.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "21"} for call in message.tool_calls or ()
    ]
    history = [QUESTION, message.to_dict(), *results]
    again = tool_calling_server.post("/v1/chat/completions", {"messages": history, "tools": TOOLS}).json
    assert again["usage"]["prompt_tokens"] > done.usage.prompt_tokens  # type: ignore[union-attr]
    response = tool_calling_server.post("/v1/chat/completions", {"messages": history[:-1], "tools": TOOLS})
    assert (response.status, response.error["code"]) == (400, "invalid_value")  # a call without a result


def test_tool_choice_none_allows_no_calls(client: OpenAI):
    done = client.chat.completions.create(
        model="any",
        messages=[QUESTION],  # type: ignore[list-item]
        tools=TOOLS,  # type: ignore[arg-type]
        tool_choice="none",
    )
    assert done.choices[0].message.tool_calls is None
    assert done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_tool_calls_there_is_one_call(tool_calling_server: Running, stream: bool):
    """The reply ends after its first call."""
    request = {"messages": [QUESTION], "tools": TOOLS, "parallel_tool_calls": False, "stream": stream}
    answer = tool_calling_server.post("/v1/chat/completions", request)
    if stream:
        pieces = [piece["choices"][0] for piece in answer.events]
        calls = [call for piece in pieces for call in piece["delta"].get("tool_calls", ())]
        assert {call["index"] for call in calls} == {0}
        arguments, reason = (
            "".join(call["function"]["arguments"] for call in calls),
            pieces[-1]["finish_reason"],
        )
    else:
        [choice] = answer.json["choices"]
        [call] = choice["message"]["tool_calls"]
        arguments, reason = call["function"]["arguments"], choice["finish_reason"]
    assert (json.loads(arguments), reason) == ({"city": "Paris"}, "tool_calls")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_tool_choice_can_require_a_call(served: Running, choice: object, stream: bool):
    digits = {"type": "integer", "minimum": 0, "maximum": 99}
    parameters = {
        "type": "object",
        "properties": {"a": digits, "b": digits},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
    request = ASK | {"tools": tools, "tool_choice": choice, "stream": stream, "think_budget": 20}
    answer = served.post("/v1/chat/completions", request)
    if stream:
        pieces = [piece["choices"][0] for piece in answer.events]
        calls = [call for piece in pieces for call in piece["delta"].get("tool_calls", ())]
        name = calls[0]["function"]["name"]
        arguments = "".join(call["function"]["arguments"] for call in calls if call["index"] == 0)
        reason = pieces[-1]["finish_reason"]
    else:
        [choice_] = answer.json["choices"]
        first, reason = choice_["message"]["tool_calls"][0], choice_["finish_reason"]
        name, arguments = first["function"]["name"], first["function"]["arguments"]
    assert (name, reason) == ("add", "tool_calls")
    assert set(json.loads(arguments)) == {"a", "b"}
