"""Tool calls parsed from ids: the forms of three versions, any tokenization, and what is no call."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_mlx.events import AnswerToken, ThinkToken, ToolCall, ToolCallToken
from magistral_mlx.text.thinking import parse
from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.text.toolcalls import CallParser
from magistral_mlx.text.transcript import TextEvent, Transcript
from tests.tokenizers import CONTROLS, VERSIONS

Open = Callable[[str], Tokenizer]
EOS = 2
MARKERS = {"[TOOL_CALLS]": 9, "[ARGS]": 32, "[CALL_ID]": 33, "[THINK]": 34, "[/THINK]": 35}
PARIS, ROME = '{"city": "Paris"}', '{"city": "Rome", "days": [1, {"a": "}\\""}]}'


def ids_of(tokenizer: Tokenizer, text: str, *, bytewise: bool = False) -> list[int]:
    """Ids of a transcript in which control tokens are written by name."""
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, MARKERS))})", text):
        if part in MARKERS:
            ids.append(MARKERS[part])
        else:
            ids += [CONTROLS + byte for byte in part.encode()] if bytewise else tokenizer.encode(part)
    return ids


def play(
    tokenizer: Tokenizer, ids: Sequence[int], *, stop: tuple[str, ...] = ()
) -> tuple[Transcript, list[TextEvent]]:
    """Feed `ids` and check what holds for any: every id is accounted for, and the pieces join to the text."""
    transcript = Transcript(tokenizer, stop=stop, calls=CallParser("key"))
    events = [event for token_id in ids for event in transcript.feed(token_id)]
    last, leftover = transcript.flush()
    events += last
    assert [i for event in events for i in event.token_ids] + list(leftover) == list(ids)
    assert "".join(e.text for e in events if isinstance(e, ThinkToken)) == transcript.thinking
    assert "".join(e.text for e in events if isinstance(e, AnswerToken)) == transcript.answer
    begun = previewed(events)
    assert [call for call in begun if call in transcript.tool_calls] == list(transcript.tool_calls)
    assert len({call.id for call in begun}) == len(begun)
    return transcript, events


def previewed(events: Sequence[TextEvent]) -> list[ToolCall]:
    """The calls that the pieces add up to, in the order they began."""
    calls: list[ToolCall] = []
    for event in events:
        if not isinstance(event, ToolCallToken):
            continue
        if event.index == len(calls):
            assert event.id is not None
            assert event.name is not None
            calls.append(ToolCall(id=event.id, name=event.name, arguments=""))
        else:
            assert (event.index, event.id, event.name) == (len(calls) - 1, None, None)
        calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + event.text)
    return calls


def parsed(tokenizer: Tokenizer, text: str, **options: tuple[str, ...]) -> tuple[str, str, list[str]]:
    """(thinking, answer, calls), the same however the text is cut into ids."""
    results = []
    for bytewise in (False, True):
        transcript, _ = play(tokenizer, [*ids_of(tokenizer, text, bytewise=bytewise), EOS], **options)
        calls = [f"{call.name} {call.arguments}" for call in transcript.tool_calls]
        results.append((transcript.thinking, transcript.answer, calls, transcript.tool_calls))
    assert results[0] == results[1]
    return results[0][:3]


# The forms


@pytest.mark.parametrize("before", ["", "<think>\nWeather?\n</think>\n\n", "<think>\nWeather?\n"])
def test_calls_of_v11(full_tokenizer: Open, before: str):
    thought = "Weather?" if before else ""
    tokenizer = full_tokenizer("v11")
    text = f"{before}[TOOL_CALLS]weather[CALL_ID]abcDEF123[ARGS]{PARIS}[TOOL_CALLS]weather[ARGS] {ROME}"
    assert parsed(tokenizer, text) == (thought, "", [f"weather {PARIS}", f"weather {ROME}"])
    transcript, events = play(tokenizer, [*ids_of(tokenizer, text), EOS])
    assert transcript.tool_calls[0].id == "abcDEF123"
    assert re.fullmatch("[a-zA-Z0-9]{9}", transcript.tool_calls[1].id)
    assert sum(isinstance(event, ToolCallToken) for event in events) > 8  # streamed in pieces
    assert transcript.phase == "answer"


@pytest.mark.parametrize("before", ["", "[THINK]Weather?[/THINK]", "[THINK]Weather?\n"])
def test_calls_of_v13(full_tokenizer: Open, before: str):
    thought = "Weather?" if before else ""
    text = f"{before}[TOOL_CALLS]weather[ARGS]{PARIS}[TOOL_CALLS]time-in_2[ARGS]{{}}"
    assert parsed(full_tokenizer("v13"), text) == (thought, "", [f"weather {PARIS}", "time-in_2 {}"])


@pytest.mark.parametrize("arguments", [PARIS, json.dumps(PARIS)])
def test_calls_of_v7(full_tokenizer: Open, arguments: str):
    calls = f'[{{"name": "weather", "arguments": {arguments}, "id": "abcDEF123"}}, '
    calls += f'{{"arguments": {ROME}, "name": "weather"}}]'
    tokenizer = full_tokenizer("v7")
    text = f"<think>Weather?</think>[TOOL_CALLS] {calls}\n"
    assert parsed(tokenizer, text) == ("Weather?", "", [f"weather {PARIS}", f"weather {ROME}"])
    assert play(tokenizer, ids_of(tokenizer, text))[0].tool_calls[0].id == "abcDEF123"


@pytest.mark.parametrize("version", VERSIONS)
def test_parser_stops_after_the_most_calls(full_tokenizer: Open, version: str):
    both = {
        "v7": f'[TOOL_CALLS][{{"name": "f", "arguments": {PARIS}}}, {{"name": "g", "arguments": {ROME}}}]',
        "v11": f"[TOOL_CALLS]f[CALL_ID]000000001[ARGS]{PARIS}[TOOL_CALLS]g[CALL_ID]000000002[ARGS]{ROME}",
        "v13": f"[TOOL_CALLS]f[ARGS]{PARIS}[TOOL_CALLS]g[ARGS]{ROME}",
    }[version]
    tokenizer = full_tokenizer(version)
    transcript, ids = Transcript(tokenizer, calls=CallParser("key", most=1)), iter(ids_of(tokenizer, both))
    while not transcript.stopped:
        transcript.feed(next(ids))
    transcript.flush()
    assert [(call.name, call.arguments) for call in transcript.tool_calls] == [("f", PARIS)]
    assert transcript.answer == ""


def test_text_around_calls_is_the_answer(full_tokenizer: Open):
    text = f"<think>Hm</think>\n\nI'll see.\n[TOOL_CALLS]a[ARGS]{PARIS}\n[TOOL_CALLS]b[ARGS]{ROME}\n\nSeen."
    answer = "I'll see.\n\n\nSeen."
    assert parsed(full_tokenizer("v11"), text) == ("Hm", answer, [f"a {PARIS}", f"b {ROME}"])


def test_held_back_text_comes_before_the_call(tiny_tokenizer: Open):
    tokenizer = tiny_tokenizer("v11")
    for before in ("<thi", "ST", "\u20ac"[:1] + "ST", "a</thin"):
        _, events = play(tokenizer, ids_of(tokenizer, f"{before}[TOOL_CALLS]a[ARGS]{{}}"), stop=("STOP",))
        kinds = [type(event) for event in events]
        assert kinds == sorted(kinds, key=[AnswerToken, ToolCallToken].index)
        assert "".join(e.text for e in events if isinstance(e, AnswerToken)) == before


def test_stop_strings_apply_to_the_answer_only(tiny_tokenizer: Open):
    text = '[TOOL_CALLS]a[ARGS]{"b": "STOP"}'
    assert parsed(tiny_tokenizer("v11"), text, stop=("STOP",)) == ("", "", ['a {"b": "STOP"}'])
    transcript, _ = play(tiny_tokenizer("v11"), ids_of(tiny_tokenizer("v11"), text), stop=("STOP",))
    assert not transcript.stopped
    assert parsed(tiny_tokenizer("v11"), f"{text} So STOP", stop=("STOP",)) == (
        "",
        " So ",
        ['a {"b": "STOP"}'],
    )


def test_call_ids_are_the_models_or_made_from_the_key(tiny_tokenizer: Open):
    tokenizer = tiny_tokenizer("v11")
    text = "[TOOL_CALLS]a[CALL_ID]{0}[ARGS]{{}}" * 2 + "[TOOL_CALLS]a[ARGS]{{}}" * 2
    for given_id, own in (("abcDEF123", True), ("call_1-x", False), ("", False)):
        ids = [call.id for call in play(tokenizer, ids_of(tokenizer, text.format(given_id)))[0].tool_calls]
        assert len(set(ids)) == 4
        assert all(re.fullmatch("[a-zA-Z0-9]{9}", i) for i in ids)
        assert (ids[0] == given_id) == own
        again = Transcript(tokenizer, calls=CallParser("another key"))
        for i in ids_of(tokenizer, text.format(given_id)):
            again.feed(i)
        assert ids[2] != again.tool_calls[2].id


def test_without_tools_call_tokens_are_ordinary(tiny_tokenizer: Open):
    transcript = Transcript(tiny_tokenizer("v11"))
    for i in ids_of(tiny_tokenizer("v11"), "<think>a[TOOL_CALLS]b</think>c[ARGS]{}"):
        transcript.feed(i)
    assert (transcript.thinking, transcript.answer, transcript.tool_calls) == ("ab", "c{}", ())


# Malformed calls


@pytest.mark.parametrize(
    "broken",
    [
        "[TOOL_CALLS]",
        "[TOOL_CALLS]weather",
        f"[TOOL_CALLS]weather{PARIS}",  # no [ARGS]
        "[TOOL_CALLS]weather[ARGS]",
        "[TOOL_CALLS]weather[ARGS]Paris",
        "[TOOL_CALLS]weather[ARGS][1]",
        '[TOOL_CALLS]weather[ARGS]{"city": "Par',  # cut off
        '[TOOL_CALLS]weather[ARGS]{"city": "Paris}',
        '[TOOL_CALLS]weather[ARGS]{"city": Paris}',
        '[TOOL_CALLS]weather[ARGS]{"city": NaN} and',
        '[TOOL_CALLS]weather[ARGS]{"city"] and',
        f"[TOOL_CALLS][ARGS]{PARIS}",  # no name
        f"[TOOL_CALLS]the weather~[ARGS]{PARIS}",
        f"[TOOL_CALLS]{'w' * 65}~[ARGS]{PARIS}",
        f"[TOOL_CALLS]weather[CALL_ID]a[CALL_ID]b~[ARGS]{PARIS}",
        '[TOOL_CALLS]weather[ARGS]{"city": [ARGS]"Paris"}',
        '[TOOL_CALLS][{"name": "weather"}]',
        '[TOOL_CALLS][{"name": "the weather", "arguments": {}}]',
        '[TOOL_CALLS][{"name": 1, "arguments": {}}]',
        '[TOOL_CALLS][{"name": "weather", "arguments": "Paris"}]',
        '[TOOL_CALLS][{"name": "weather", "arguments": {"a": "\\ud800"}}]',
        '[TOOL_CALLS][{"name": "weather", "arguments": {',
        "[TOOL_CALLS][1]",
        "[TOOL_CALLS][]",
        f"[TOOL_CALLS]weather[ARGS]{'[' * 5000}",
    ],
)
def test_malformed_calls_are_text(tiny_tokenizer: Open, broken: str):
    """After "~" it is known to be text, from which the names of control tokens are left out."""
    text = f"<think>Hm[TOOL_CALLS]a[ARGS]{{}}{broken.replace('~', '')}"
    expected = ("Hm", re.sub(r"~\[\w+\]", "", broken), ["a {}"])
    assert parsed(tiny_tokenizer("v11"), text) == expected


def test_deeply_nested_arguments_raise_no_error(tiny_tokenizer: Open):
    """How deep JSON may nest depends on Python's version: it is a call, or text, and nothing is lost."""
    arguments = f'{{"a": {"[" * 2000}{"]" * 2000}}}'
    thinking, answer, calls = parsed(tiny_tokenizer("v11"), f"<think>Hm[TOOL_CALLS]a[ARGS]{arguments}")
    assert thinking == "Hm"
    assert answer + "".join(calls) in (f"[TOOL_CALLS]a[ARGS]{arguments}", f"a {arguments}")


def test_malformed_call_does_not_affect_the_next_one(tiny_tokenizer: Open):
    text = '[TOOL_CALLS]a[ARGS]{"b": [TOOL_CALLS]c[ARGS]{}[TOOL_CALLS]d e[TOOL_CALLS]f[ARGS]{}'
    assert parsed(tiny_tokenizer("v13"), text) == (
        "",
        '[TOOL_CALLS]a[ARGS]{"b": [TOOL_CALLS]d e',
        ["c {}", "f {}"],
    )


def test_text_after_a_stray_token_is_not_held_back(tiny_tokenizer: Open):
    tokenizer = tiny_tokenizer("v11")
    transcript = Transcript(tokenizer, calls=CallParser("key"))
    events = [e for i in ids_of(tokenizer, "[TOOL_CALLS]Sure, ", bytewise=True) for e in transcript.feed(i)]
    assert "".join(event.text for event in events) == "[TOOL_CALLS]Sure, "


# Any ids


PARTS = (
    *("<think>", "</think>", "</", "é", "\n", "a", "weather", "{", "}", "[", "]", '"', "\\", ":", "1", ","),
    *(PARIS, ROME, '{"a":1}', "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "weather[ARGS]", "[TOOL_CALLS]b[ARGS]"),
    '[{"name":"c","arguments":{"a":1}}]',
)


def reference(text: str, *, tags: bool) -> tuple[str, str, list[str]]:
    """Parses the whole text, with json's own decoder; names of control tokens are left out of the answer."""
    head, *rest = text.split("[TOOL_CALLS]")
    thinking, answer = parse(without_markers(head)) if tags else ("", without_markers(head))
    calls: list[str] = []
    for part in rest:
        found, end = parse_calls(part)
        calls += found
        rest_of_part = without_markers(part[end:])
        answer += rest_of_part if rest_of_part.strip() or not found else ""
    return thinking, answer.lstrip(), calls


def without_markers(text: str) -> str:
    return re.sub(r"\[(ARGS|CALL_ID|TOOL_CALLS)\]", "", text)


def parse_calls(part: str) -> tuple[list[str], int]:
    head = re.match(
        r"\s*([\w-]{1,64})\s*(\[CALL_ID\]\s*[\w-]{0,64}\s*)?\[ARGS\]\s*(?=\{)|\s*(?=\[\{)", part, re.ASCII
    )
    if not head:
        return [], 0
    try:
        value, size = json.JSONDecoder().raw_decode(part[head.end() :])
    except ValueError:
        return [], 0
    end = head.end() + size
    if without_markers(part[head.end() : end]) != part[head.end() : end]:
        return [], 0
    if head[1]:
        return [f"{head[1]} {part[head.end() : end]}"], end
    return [f"{call['name']} {json.dumps(call['arguments'])}" for call in value], end


@pytest.mark.parametrize("version", VERSIONS)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14))
@settings(max_examples=70)
def test_any_text_equals_the_reference(tiny_tokenizer: Open, version: str, parts: list[str]):
    text = "".join(parts)
    if version == "v7":  # has one control token only
        text = re.sub(r"\[(ARGS|CALL_ID)\]", "", text)
    thinking, answer, calls = parsed(tiny_tokenizer(version), text)
    expected = reference(text, tags=version != "v13")
    assert (thinking, without_markers(answer).lstrip(), calls) == expected


@pytest.mark.parametrize("version", VERSIONS)
@given(ids=st.lists(st.sampled_from([9, 32, 33, 34, 35, EOS, 10**6, *range(1030, 1130), 1195]), max_size=30))
@settings(max_examples=50)
def test_any_ids_are_accounted_for(tiny_tokenizer: Open, version: str, ids: list[int]):
    play(tiny_tokenizer(version), ids)


@given(st.data())
@settings(max_examples=50)
def test_any_json_arguments(full_tokenizer: Open, data: st.DataObject):
    """Objects of all that JSON has, in the real vocabulary."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    values = st.recursive(
        leaves | texts, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3)
    )
    arguments = json.dumps(
        data.draw(st.dictionaries(texts, values, max_size=4)), ensure_ascii=data.draw(st.booleans())
    )
    tokenizer = full_tokenizer("v11")
    ids = [*ids_of(tokenizer, "<think>a</think>[TOOL_CALLS]f[ARGS]"), *tokenizer.encode(arguments), EOS]
    assert [call.arguments for call in play(tokenizer, ids)[0].tool_calls] == [arguments]
