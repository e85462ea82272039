"""Ids → events: text and phases as the reference has them, stop strings, and every id accounted for."""

import random
from collections.abc import Callable
from itertools import accumulate, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magistral_mlx.errors import SamplingError
from magistral_mlx.events import AnswerToken, ThinkToken
from magistral_mlx.text.thinking import parse
from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.text.transcript import TextEvent, Transcript
from tests.tokenizers import CONTROLS, LANGUAGES

Open = Callable[[str], Tokenizer]
EOS = 2


def as_bytes(text: str) -> list[int]:
    """The longest tokenization: one id per byte, so that characters and tags are split everywhere."""
    return [CONTROLS + byte for byte in text.encode()]


def play(
    tokenizer: Tokenizer, ids: list[int], *, stop: tuple[str, ...] = ()
) -> tuple[Transcript, list[TextEvent]]:
    """Feed `ids` and check what holds for any: text in its phase, and no id lost, doubled or moved."""
    transcript = Transcript(tokenizer, stop=stop)
    events = [event for token_id in ids for event in transcript.feed(token_id)]
    last, leftover = transcript.flush()
    events += last
    assert [i for event in events for i in event.token_ids] + list(leftover) == ids
    assert all(event.text for event in events)
    assert "".join(event.text for event in events if isinstance(event, ThinkToken)) == transcript.thinking
    assert "".join(event.text for event in events if isinstance(event, AnswerToken)) == transcript.answer
    kinds = [type(event).__name__ for event in events]
    assert kinds == sorted(kinds, reverse=True)
    return transcript, events


def parsed(tokenizer: Tokenizer, ids: list[int], **options: tuple[str, ...]) -> tuple[str, str]:
    transcript, _ = play(tokenizer, ids, **options)
    return transcript.thinking, transcript.answer


# The tags as the real vocabulary writes them

BEFORE = ("", " ", "\n", "\n\n \t")
OPENED = ("", " ", "\n", "\n\n", "\\boxed{1}", "The", "한", "<", ">", "1", "  x")
THOUGHT = (
    *(".", ")", "。", "\n", " ", "", "!\n", "\n\n", "`", '"', "<", "</", "</th", "x", "한", "é", "👩‍🚀"),
    *("<think>", "1", ":", ",", "?", "(", "[", "*", "**", "'", "-", "…", "\r\n", "\u3000", "क", "ا", "```\n"),
    *("}$", "\t"),
)
CLOSED = (
    *("", " ", "\n", "\n\n", "\n\n\n    ", "\\boxed{85}", "The", ".", ">", "`", '"', "</think>", "<think>"),
    *("<", "한", "é", "1", "\r\n", "\t", "**85**", "\n```py\n", "$", "\u3000答", "जी", "لا", "👩‍🚀"),
    *("(", "\n- "),
)
GRID = [
    *(f"{before}<think>{after}Then." for before, after in product(BEFORE, OPENED)),
    *(f"<think>\nCarry{before}</think>{after}" for before, after in product(THOUGHT, CLOSED)),
]


def test_text_around_both_tags_equals_the_reference(full_tokenizer: Open):
    tokenizer, spellings = full_tokenizer("v11"), set()
    assert len(GRID) >= 300
    for text in GRID:
        ids = tokenizer.encode(text)
        assert parsed(tokenizer, [*ids, EOS]) == parse(text)
        if "</think>" in text:
            spellings.add(closing_ids(tokenizer, ids, len(text.partition("</think>")[0].encode())))
    assert len(spellings) > 100  # why ids cannot be matched


def closing_ids(tokenizer: Tokenizer, ids: list[int], start: int) -> tuple[int, ...]:
    """The ids that hold a byte of the closing tag, which begins at the byte `start`."""
    ends = list(accumulate(len(tokenizer.pieces[i] or b"") for i in ids))
    begins = [0, *ends]
    return tuple(i for i, a, b in zip(ids, begins, ends, strict=False) if a < start + 8 and b > start)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_parsed(full_tokenizer: Open, language: str):
    tokenizer, text = full_tokenizer("v11"), LANGUAGES[language]
    ids = tokenizer.encode(f"<think>\n{text}\n</think>\n\n{text}\n")
    assert parsed(tokenizer, ids) == (text, f"{text}\n")
    assert parsed(tokenizer, as_bytes(f" <think>{text}</think> {text}")) == (text, f" {text}")


def test_random_ids_equal_the_reference(full_tokenizer: Open):
    tokenizer, draw = full_tokenizer("v11"), random.Random(1)
    for _ in range(300):
        parts = [[draw.randrange(CONTROLS - 3, 131072) for _ in range(draw.randrange(12))] for _ in range(3)]
        ids = parts[0] * draw.randrange(2) + tokenizer.encode("<think>") + parts[1]
        ids += tokenizer.encode("</think>") + parts[2]
        assert parsed(tokenizer, ids) == parse(tokenizer.decode(ids))


PARTS = ("<think>", "</think>", "<th", "</", "think", ">", " ", "\n", "é", "한", "So.", "STOP")
texts = st.lists(st.sampled_from(PARTS), max_size=15).map("".join)


@st.composite
def random_ids(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Ids of some text, cut into tokens at random, with ids between them that have no text or no meaning."""
    ids: list[int] = []
    for part in draw(st.lists(st.sampled_from(PARTS), max_size=12)):
        ids += as_bytes(part) if draw(st.booleans()) else tokenizer.encode(part)
        ids += draw(st.sampled_from([[], [], [], [EOS], [CONTROLS + 0xE2], [10**6]]))
    return ids


@given(st.data())
def test_any_ids_equal_the_reference(tiny_tokenizer: Open, data: st.DataObject):
    tokenizer = tiny_tokenizer("v11")
    ids = data.draw(random_ids(tokenizer))
    assert parsed(tokenizer, ids) == parse(tokenizer.decode(ids))


# Stop strings


def cut_at_stop(answer: str, stop: tuple[str, ...]) -> str:
    """The answer up to the stop string that is complete first; the longer one, of two that end together."""
    for end in range(1, len(answer) + 1):
        for at in range(end):
            if answer[at:end] in stop:
                return answer[:at]
    return answer


STOPS = ("STOP", "TO", "OPS", "\n\n", "한S", " é", "</think>", "S")


@given(texts, st.lists(st.sampled_from(STOPS), max_size=3).map(tuple))
def test_stop_strings_end_the_answer_only(tiny_tokenizer: Open, text: str, stop: tuple[str, ...]):
    tokenizer = tiny_tokenizer("v11")
    thinking, answer = parse(text)
    for ids in (as_bytes(text), tokenizer.encode(text)):
        transcript, _ = play(tokenizer, [*ids, EOS], stop=stop)
        assert (transcript.thinking, transcript.answer) == (thinking, cut_at_stop(answer, stop))
        assert transcript.stopped == any(each in answer for each in stop)


def test_a_stop_string_split_over_tokens(full_tokenizer: Open):
    tokenizer = full_tokenizer("v11")
    ids = tokenizer.encode("<think>\nA STOP.\n</think>\nGo to the ST") + tokenizer.encode("OP sign.")
    transcript, events = play(tokenizer, ids, stop=("STOP sign", "\n\n"))
    assert transcript.stopped
    assert (transcript.thinking, transcript.answer) == ("A STOP.", "Go to the ")
    assert events[-1].text.isspace()


def test_of_two_stop_strings_the_one_complete_first(tiny_tokenizer: Open):
    tokenizer = tiny_tokenizer("v11")
    for ids in (as_bytes("aSTOP"), [*tokenizer.encode("a"), *tokenizer.encode("STOP")]):
        assert parsed(tokenizer, ids, stop=("STOP", "TO")) == ("", "aS")


def test_unfinished_stop_string_is_emitted_at_the_end(tiny_tokenizer: Open):
    transcript = Transcript(tiny_tokenizer("v11"), stop=("STOP",))
    events = [event for i in as_bytes("Go STO") for event in transcript.feed(i)]
    assert "".join(event.text for event in events) == "Go "
    events, leftover = transcript.flush()
    assert events == [AnswerToken(text="STO", token_ids=tuple(as_bytes("STO")))]
    assert (leftover, transcript.stopped) == ((), False)


def test_empty_stop_string_is_refused(tiny_tokenizer: Open):
    with pytest.raises(SamplingError, match="at least one character"):
        Transcript(tiny_tokenizer("v11"), stop=("a", ""))


# Control tags


@pytest.mark.parametrize("version", ["v7", "v11", "v13"])
def test_tokenizer_decides_which_tags_count(full_tokenizer: Open, version: str):
    tokenizer = full_tokenizer(version)
    text = tokenizer.encode("<think>\na\n</think>\nb")
    control = [34, *tokenizer.encode("\na </think>\n"), 35, *tokenizer.encode("\nb"), 34, 35]
    expected = [("a", "b"), ("", "a </think>\n\nb")]
    if version == "v13":
        expected = [("", "<think>\na\n</think>\nb"), ("a </think>", "b")]
    assert [parsed(tokenizer, [*ids, EOS]) for ids in (text, control)] == expected


def test_half_a_character_before_a_control_tag(tiny_tokenizer: Open):
    half = as_bytes("é")[:1]
    assert parsed(tiny_tokenizer("v13"), [34, *half, 35, *half, EOS]) == ("\ufffd", "\ufffd")


@given(st.lists(st.sampled_from([34, 35, EOS, *as_bytes("<é\n ")]), max_size=12))
def test_any_control_tags_keep_every_id(tiny_tokenizer: Open, ids: list[int]):
    tokenizer = tiny_tokenizer("v13")
    transcript, _ = play(tokenizer, ids)
    text = tokenizer.decode(ids)
    shown = transcript.thinking + transcript.answer
    assert "".join(shown.split()) == "".join(text.split())


# The ids of an event, and the phase


def test_ids_without_text_are_on_the_next_event(full_tokenizer: Open):
    tokenizer = full_tokenizer("v11")
    opening, thought, closing, answer = map(tokenizer.encode, ("<think>\n", "Carry", "</think>\n", "85"))
    transcript, events = play(tokenizer, [*opening, *thought, *closing, *answer, EOS])
    assert events[0].token_ids[: len(opening)] == tuple(opening)
    assert [event.text for event in events if isinstance(event, AnswerToken)] == ["8", "5"]
    assert next(e for e in events if isinstance(e, AnswerToken)).token_ids == (*closing, answer[0])
    assert transcript.flush() == ([], ())


def test_ids_after_the_last_text_are_left_over(tiny_tokenizer: Open):
    transcript = Transcript(tiny_tokenizer("v11"))
    assert [transcript.feed(i) for i in (*as_bytes("<think>a"), EOS)][-2:] == [
        [ThinkToken(text="a", token_ids=tuple(as_bytes("<think>a")))],
        [],
    ]
    assert transcript.flush() == ([], (EOS,))


def test_phase_after_each_id(tiny_tokenizer: Open):
    transcript, phases = Transcript(tiny_tokenizer("v11")), []
    for i in as_bytes("<think>a</think>b"):
        transcript.feed(i)
        phases.append(transcript.phase)
    assert phases == ["thinking"] * 15 + ["answer"] * 2
