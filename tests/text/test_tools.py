"""Tools from end to end: prompts are mistral_common's, replies and conversations carry calls and results."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.tool_calls import ToolCall as TheirCall

from magistral_mlx import Finished, PromptError, ToolCall, ToolCallToken
from magistral_mlx.chat import Magistral
from magistral_mlx.talk.display import Terminal
from magistral_mlx.talk.notebook import _View
from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.text.tools import call_id, forced, read_tools
from tests.scripted import scripted
from tests.text.test_toolcalls import ids_of
from tests.tokenizers import VERSIONS

Open = Callable[[str], Tokenizer]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Wie ist das Wetter?", "parameters": PARAMETERS},
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {}}}
TOOLS = [WEATHER, TIME]
PARIS, ROME = '{"city": "Paris"}', '{"city": "Rome"}'


def assistant_calls(*calls: tuple[str, str, str], **more: str) -> dict[str, Any]:
    tool_calls = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls, **more}


def result(of: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": of, "content": content}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


ONE = [user("Paris?"), assistant_calls(("abcDEF123", "weather", PARIS)), result("abcDEF123", '{"t": 21}')]
TWO = [
    user("Paris, Rome?"),
    assistant_calls(("abcDEF123", "weather", PARIS), ("000000001", "weather", ROME), content="I'll look."),
    result("000000001", "30"),
    result("abcDEF123", ""),
]
HISTORIES = {
    "a question": [user("a")],
    "a result": ONE,
    "two results": TWO,
    "calls after calls": [*TWO, assistant_calls(("abcDEF124", "time", "{}")), result("abcDEF124", "noon")],
    "an earlier turn": [*TWO, {"role": "assistant", "content": "30 °C."}, user("Thanks."), *ONE[1:]],
    "a question after calls": [*ONE, {"role": "assistant", "content": "21 °C."}, user("Thanks.")],
}


# Prompts


def reference(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
    """Through mistral_common's own classes, with its own reading of OpenAI's shape."""
    kinds = {"user": UserMessage, "tool": ToolMessage}
    converted = []
    for message in messages:
        fields = {key: value for key, value in message.items() if key != "role"}
        if message["role"] == "assistant":
            calls = [TheirCall.from_openai(call) for call in fields.pop("tool_calls", [])]
            converted.append(AssistantMessage(**fields, tool_calls=calls or None))
        else:
            converted.append(kinds[message["role"]](**fields))
    request = ChatCompletionRequest(
        messages=converted, tools=[Tool.from_openai(tool) for tool in tools] or None
    )
    return tokenizer._mistral.encode_chat_completion(request).tokens


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tools", [[], TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("history", HISTORIES)
def test_prompts_equal_mistral_commons(full_tokenizer: Open, version: str, tools: list, history: str):
    tokenizer = full_tokenizer(version)
    ids = tokenizer.encode_chat(HISTORIES[history], think=False, tools=tools)
    assert ids == reference(tokenizer, HISTORIES[history], tools)
    assert (5 in ids) == bool(tools)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("keep", [False, True])
def test_reasoning_of_this_turn_is_kept(full_tokenizer: Open, version: str, keep: bool):
    """It led to calls that are being answered; for earlier turns, `keep_thinking` decides."""
    tokenizer = full_tokenizer(version)
    first, second = assistant_calls(("abcDEF123", "time", "{}")), assistant_calls(("000000001", "time", "{}"))
    messages = [
        user("a"),
        {**first, "thinking": "One."},
        result("abcDEF123", "1"),
        {"role": "assistant", "content": "Noon.", "thinking": "Two."},
        user("b"),
        {**second, "thinking": "Three."},
        result("000000001", "2"),
    ]

    def thought(text: str, answer: str) -> object:
        if tokenizer.think_ids:
            chunks = [ThinkChunk(thinking=text), *([TextChunk(text=answer)] if answer else [])]
            return [chunk.model_dump() for chunk in chunks]
        return f"<think>\n{text}\n</think>\n{answer}"

    expected = [
        user("a"),
        {**first, "content": thought("One.", "") if keep else ""},
        result("abcDEF123", "1"),
        {"role": "assistant", "content": thought("Two.", "Noon.") if keep else "Noon."},
        user("b"),
        {**second, "content": thought("Three.", "")},
        result("000000001", "2"),
    ]
    ids = tokenizer.encode_chat(messages, think=False, keep_thinking=keep, tools=TOOLS)
    assert ids == reference(tokenizer, expected, TOOLS)


@pytest.mark.parametrize("version", VERSIONS)
def test_call_ids_in_other_formats_are_mapped(tiny_tokenizer: Open, version: str):
    """`call_…` becomes nine letters and digits, the same in the call and in its result."""
    tokenizer = tiny_tokenizer(version)
    foreign = [user("a"), assistant_calls(("call_abc", "time", "{}")), result("call_abc", "noon")]
    mapped = [
        user("a"),
        assistant_calls((call_id("call_abc"), "time", "{}")),
        result(call_id("call_abc"), "noon"),
    ]
    assert tokenizer.encode_chat(foreign) == tokenizer.encode_chat(mapped)
    assert call_id("call_abc") == call_id("call_abc") != call_id("call_abd")
    assert call_id("abcDEF123") == "abcDEF123"


def test_equivalent_shapes_give_the_same_prompt(tiny_tokenizer: Open):
    tokenizer = tiny_tokenizer("v11")
    bare = [WEATHER["function"], {"name": "time", "description": None}]
    assert tokenizer.encode_chat("a", tools=bare) == tokenizer.encode_chat("a", tools=TOOLS)
    odd = assistant_calls(("abcDEF123", "weather", json.loads(PARIS)))  # type: ignore[arg-type]
    odd["tool_calls"][0] |= {"index": 0}
    odd |= {"content": None}
    named = result("abcDEF123", '{"t": 21}') | {"name": "weather"}
    assert tokenizer.encode_chat([user("Paris?"), odd, named]) == tokenizer.encode_chat(ONE)
    empty = [user("a"), assistant_calls(("abcDEF123", "time", "")), result("abcDEF123", "")]
    full = [user("a"), assistant_calls(("abcDEF123", "time", "{}")), result("abcDEF123", "")]
    assert tokenizer.encode_chat(empty) == tokenizer.encode_chat(full)
    broken = [user("a"), assistant_calls(("abcDEF123", "time", '{"a')), result("abcDEF123", "what?")]
    assert tokenizer.encode_chat(broken)  # a framework may report a call that could not be parsed


def function(**fields: object) -> list:
    return [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS, **fields}}]


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("weather", "tools to be a list of definitions, found a str"),
        (3, "found a int"),
        (["weather"], r"tools\[0\] to be a mapping"),
        ([{"type": "retrieval", "function": {}}], "of the type function, found 'retrieval'"),
        ([{"type": "function", "function": None}], r"tools\[0\]'s function to be a mapping"),
        (function(name="the weather"), "letters, digits, - and _, found 'the weather'"),
        (function(name=None), "found None"),
        (function(name="f" * 65), "1 to 64"),
        ([*TOOLS, WEATHER], r"a name of its own, found \['weather'\] twice"),
        (function(parameters={"type": "string"}), "JSON schema of type object, found 'string'"),
        (function(parameters=[1]), "parameters to be a mapping"),
        (function(parameters={"type": "object", "properties": {"a": {1}}}), "plain JSON"),
        (function(parameters={"type": "object", "minProperties": float("nan")}), "plain JSON"),
        (function(parameters={"type": "object", "properties": 3}), "mistral_common refuses"),
        (function(description=3), "description to be text"),
    ],
)
def test_invalid_tools_are_refused(tiny_tokenizer: Open, tools: Any, says: str):
    with pytest.raises(PromptError, match=says):
        tiny_tokenizer("v11").encode_chat("a", tools=tools)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (ONE[:2], "last message from the user or a tool, found assistant"),
        ([ONE[0], ONE[2]], r"messages\[1\] to answer a tool call of the message before"),
        ([ONE[2]], r"messages\[0\] to answer"),
        ([*ONE[:2], user("b")], r"a result of each tool call before messages\[2\], found 1 without"),
        (TWO[:3], "a result of each tool call at the end, found 1 without"),
        ([*ONE, ONE[2]], r"messages\[3\] to answer"),
        ([*ONE[:2], result("000000009", "a")], r"messages\[2\] to answer"),
        ([*ONE[:2], {"role": "tool", "content": "a"}], "tool_call_id to be text, found a NoneType"),
        ([*ONE[:2], {"role": "tool", "tool_call_id": "abcDEF123"}], "content to be text"),
        ([user("a"), assistant_calls(("", "f", "{}"))], r"tool_calls\[0\]'s id to say something"),
        ([user("a"), assistant_calls(("a", "f g", "{}"))], "name to be 1 to 64"),
        ([user("a"), assistant_calls(("a", "f", 3))], "arguments to be a mapping"),  # type: ignore[arg-type]
        ([user("a"), assistant_calls(("a", "f", {"b": {1}}))], "plain JSON"),  # type: ignore[arg-type]
        ([user("a"), {"role": "assistant", "tool_calls": [{"id": "a"}]}], "function to be a mapping"),
        ([user("a"), {"role": "assistant", "tool_calls": "f"}], "list of calls, found a str"),
        ([user("a"), {"role": "assistant", "tool_calls": []}, user("b")], "content to be text"),
    ],
)
def test_invalid_histories_with_calls_are_refused(
    tiny_tokenizer: Open, version: str, messages: list, says: str
):
    with pytest.raises(PromptError, match=says):
        tiny_tokenizer(version).encode_chat(messages)


def test_deep_arguments_are_refused(tiny_tokenizer: Open):
    deep = '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}"
    with pytest.raises(PromptError):
        tiny_tokenizer("v11").encode_chat([user("a"), assistant_calls(("a", "f", deep)), result("a", "b")])


# Replies and conversations


REPLIES = {
    "v7": "<think>\nHm.\n</think>\n\n[TOOL_CALLS]"
    f'[{{"name": "weather", "arguments": {PARIS}, "id": "abcDEF123"}}, '
    f'{{"name": "weather", "arguments": {ROME}, "id": "000000001"}}]',
    "v11": f"<think>\nHm.\n</think>\n\n[TOOL_CALLS]weather[CALL_ID]abcDEF123[ARGS]{PARIS}"
    f"[TOOL_CALLS]weather[CALL_ID]000000001[ARGS]{ROME}",
    "v13": f"[THINK]Hm.[/THINK][TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]weather[ARGS]{ROME}",
}


@pytest.fixture(params=VERSIONS)
def model(request: pytest.FixtureRequest, tiny_tokenizer: Open) -> Iterator[Magistral]:
    tokenizer = tiny_tokenizer(request.param)
    with scripted(tokenizer, ids_of(tokenizer, REPLIES[request.param]), max_context=20_000) as model:
        yield model


def test_a_reply_with_calls(model: Magistral):
    with model.stream("a", tools=TOOLS, seed=1) as stream:
        events = list(stream)
    reply = stream.reply
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [
        ("weather", PARIS),
        ("weather", ROME),
    ]
    assert (reply.thinking, reply.answer, reply.finish_reason) == ("Hm.", "", "tool_calls")
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "tool_calls"
    assert [i for event in events for i in event.token_ids] == list(reply.token_ids)
    assert reply.stats.thinking_tokens + reply.stats.answer_tokens == len(reply.token_ids)
    pieces = [event for event in events if isinstance(event, ToolCallToken)]
    assert "".join(piece.text for piece in pieces) == PARIS + ROME
    assert [(p.index, p.id, p.name) for p in pieces if p.id] == [
        (index, call.id, call.name) for index, call in enumerate(reply.tool_calls)
    ]


def test_the_same_seed_gives_the_same_ids_of_calls(model: Magistral):
    def ids(question: str, seed: int) -> list[str]:
        return [call.id for call in model.ask(question, tools=TOOLS, seed=seed).tool_calls]

    assert ids("a", 1) == ids("a", 1)
    if model.tokenizer.version == "v13":  # where the model gives none
        assert len({*ids("a", 1), *ids("a", 2), *ids("b", 1)}) == 6


def test_conversation_with_calls_continues_from_the_sampled_ids(model: Magistral):
    """Results follow the sampled ids; the next question drops all reasoning, also that which led to calls."""
    talk = model.conversation(tools=TOOLS)
    first = talk.ask("a")
    second = talk.ask([call.result({"t": "21 °C"}) for call in first.tool_calls])
    so_far = (*first.prompt_ids, *first.token_ids)
    assert second.prompt_ids[: len(so_far)] == so_far
    assert second.stats.cached_tokens >= len(so_far) - 1  # the last id was sampled and not yet fed
    results = [call.result({"t": "21 °C"}) for call in first.tool_calls]
    assert results[0]["content"] == '{"t": "21 °C"}'
    expected = model.encode([user("a"), first.message, *results], tools=TOOLS)
    text = model.tokenizer._mistral.decode
    assert text(list(second.prompt_ids)).replace("\n", "") == text(expected).replace("\n", "")
    assert talk.messages == [user("a"), first.message, *results, second.message]
    third = talk.ask([call.result("b") for call in second.tool_calls])
    answers = [call.result("c") for call in third.tool_calls]
    fourth = talk.ask(answers, tool_choice="none")  # its prompt has no tool definitions
    assert list(fourth.prompt_ids) == model.encode([*talk.messages[:-1]])
    assert 5 not in fourth.prompt_ids
    assert fourth.tool_calls == ()
    fifth = talk.ask("d", tools=[TIME])
    assert list(fifth.prompt_ids) == model.encode(talk.messages[:-1], tools=[TIME])


def test_kept_reasoning_and_tools(model: Magistral):
    """A new question has the tools where the template has them; it continues from the ids if it can."""
    talk = model.conversation(keep_thinking=True, tools=TOOLS)
    calls = talk.ask("a").tool_calls
    last = talk.ask([call.result("21") for call in calls], tool_choice="none")
    with_tools, without_tools = talk.fork().ask("b"), talk.fork().ask("b", tool_choice="none")
    so_far = (*last.prompt_ids, *last.token_ids)
    assert without_tools.prompt_ids[: len(so_far)] == so_far
    assert 5 not in without_tools.prompt_ids
    assert with_tools.prompt_ids.count(5) == 1
    first = model.tokenizer.version == "v13"
    assert with_tools.prompt_ids[with_tools.prompt_ids.index(6) + 1 :].count(3) == (2 if first else 1)
    assert (with_tools.prompt_ids[: len(so_far)] == so_far) == (not first)


@pytest.mark.parametrize("version", VERSIONS)
def test_call_ids_that_the_model_omitted_are_added(tiny_tokenizer: Open, version: str):
    """Where the template has call ids, a result names its call: so the call is encoded again."""
    reply = re.sub(r"\[CALL_ID\]\w+|, \"id\": \"\w+\"", "", REPLIES[version])
    with scripted(
        tiny_tokenizer(version), ids_of(tiny_tokenizer(version), reply), max_context=20_000
    ) as model:
        talk = model.conversation(tools=TOOLS)
        first = talk.ask("a")
        second = talk.ask([call.result("21") for call in first.tool_calls])
        so_far = (*first.prompt_ids, *first.token_ids)
        named = first.tool_calls[0].id in model.tokenizer.decode(second.prompt_ids)
        assert named == (version != "v13")
        assert (second.prompt_ids[: len(so_far)] == so_far) == (version == "v13")
        if named:
            assert list(second.prompt_ids) == model.encode(talk.messages[:-1], tools=TOOLS)
            assert model.tokenizer.decode(second.prompt_ids).count(first.tool_calls[0].id) == 2


def test_results_that_do_not_match_the_calls_are_refused(model: Magistral):
    talk = model.conversation(tools=TOOLS)
    reply = talk.ask("a")
    paris, rome = (call.result("21") for call in reply.tool_calls)
    for wrong in (
        "b",
        [paris],
        [paris, paris],
        [paris, rome, rome],
        [],
        [user("b")],
        [paris, rome, user("b")],
    ):
        with pytest.raises(PromptError):
            talk.stream(wrong)  # type: ignore[arg-type]
    assert len(talk.messages) == 2
    assert talk.ask([rome, paris]).tool_calls
    assert talk.undo() == [rome, paris]
    assert talk.undo() == "a"


def test_a_saved_conversation_keeps_calls_and_results(model: Magistral, tmp_path: Path):
    talk = model.conversation(tools=[MappingProxyType(WEATHER), TIME], seed=1)
    reply = talk.ask("a")
    talk.ask([call.result("21") for call in reply.tool_calls])
    talk.save(tmp_path / "talk", with_cache=False)
    again = model.load_conversation(tmp_path / "talk")
    assert again.messages == talk.messages
    assert again.options["tools"] == read_tools(TOOLS)
    last = again._turns[-1][1]
    assert last.tool_calls == talk._turns[-1][1].tool_calls
    results = [call.result("22") for call in last.tool_calls]
    assert again.ask(results).prompt_ids == talk.ask(results).prompt_ids


def test_tool_choice(model: Magistral):
    assert 5 in model.encode("a", tools=TOOLS, tool_choice="auto")
    assert model.encode("a", tools=TOOLS, tool_choice="none") == model.encode("a")
    assert model.encode("a", tools=None, tool_choice=None) == model.encode("a")
    for wrong in ("any", "sun", 3):
        with pytest.raises(PromptError, match="Expected tool_choice to be"):
            model.stream("a", tools=TOOLS, tool_choice=wrong)  # type: ignore[typeddict-item]


def test_calls_cut_off_at_any_length(model: Magistral):
    """At any length: nothing is lost, and a call is complete or text."""
    whole = model.ask("a", tools=TOOLS, seed=1)
    lengths = range(1, len(whole.token_ids), 17)
    for before, reply in pairwise(model.ask("a", tools=TOOLS, seed=1, max_tokens=n) for n in lengths):
        assert reply.finish_reason == "length"
        assert reply.tool_calls[: len(before.tool_calls)] == before.tool_calls
        assert whole.tool_calls[: len(reply.tool_calls)] == reply.tool_calls
        assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
        assistant_calls = 9 in reply.token_ids and len(reply.tool_calls) < reply.token_ids.count(9)
        assert reply.answer.startswith("[TOOL_CALLS]") == assistant_calls


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_a_budget_and_calls(model: Magistral, budget: int):
    """The closing tag is forced; the calls still follow."""
    with model.stream("a", tools=TOOLS, think_budget=budget) as stream:
        events = list(stream)
    reply = stream.reply
    assert [i for event in events for i in event.token_ids] == list(reply.token_ids)
    assert reply.stats.forced_tokens or len(reply.tool_calls) == 2


@pytest.mark.parametrize("budget", [0, 1, 3, 10])
def test_a_call_ends_the_reasoning(tiny_tokenizer: Open, budget: int):
    """Afterwards a budget has nothing to close."""
    tokenizer = tiny_tokenizer("v11")
    ids = ids_of(tokenizer, f"[TOOL_CALLS]weather[ARGS]{PARIS}")
    with scripted(tokenizer, ids) as model:
        reply = model.ask("a", tools=TOOLS, think_budget=budget)
    assert [call.arguments for call in reply.tool_calls] == [PARIS]
    assert reply.stats.forced_tokens == 0


def test_call_of_an_unknown_tool_is_returned(tiny_tokenizer: Open):
    tokenizer = tiny_tokenizer("v11")
    with scripted(tokenizer, ids_of(tokenizer, "[TOOL_CALLS]sun[ARGS]{}")) as model:
        assert [call.name for call in model.ask("a", tools=TOOLS).tool_calls] == ["sun"]
        assert model.ask("a").answer == "sun{}"  # no tools were offered: there are no calls


# Shown


def test_a_terminal_shows_calls(capsys: pytest.CaptureFixture[str], model: Magistral):
    with model.stream("a", tools=TOOLS) as stream:
        finished = Terminal().show(stream)
    assert finished
    shown = capsys.readouterr()
    assert f"weather {PARIS}\nweather {ROME}" in shown.err
    assert shown.out == ""


def test_a_notebook_shows_calls(model: Magistral):
    view = _View()
    with model.stream("a", tools=TOOLS) as stream:
        for event in stream:
            view.take(event)
    assert view.markdown().strip() == f"```\nweather {PARIS}\nweather {ROME}\n```"
    assert "Thought for" in view.thinking()


def test_tool_may_be_named_like_a_choice():
    auto = [{"name": "auto"}]
    assert forced(auto, "auto") == []
    assert forced(auto, "required") == read_tools(auto)


@pytest.mark.parametrize("content", [object(), float("nan"), {"a": {1}}])
def test_result_that_json_cannot_represent_is_refused(content: object):
    call = ToolCall(id="abcdefghi", name="f", arguments="{}")
    with pytest.raises(PromptError, match="Expected a tool's result to be text or JSON"):
        call.result(content)
