"""The think parser against `parse`, its reference: for any text, in any chunks."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_mlx.text.thinking import Piece, ThinkParser, parse, unfinished

FRAGMENTS = (
    *("<think>", "</think>", "<thi", "nk>", "</th", "ink>", "</", "<", ">", "[THINK]", "[/THINK]", "\\boxed"),
    *(
        " ",
        "\n",
        "\t",
        "\r\n",
        "\u3000",
        "\N{NO-BREAK SPACE}",
        "a",
        "So.",
        "`",
        "```\n",
        '"',
        "한",
        "é",
        "👩‍🚀",
    ),
)
transcripts = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(lambda parts: "<think>" + "".join(parts)),
    st.text("<>/think \n", max_size=40),
)


def chunkings(text: str) -> st.SearchStrategy[list[str]]:
    cuts = st.lists(st.integers(0, len(text)), max_size=len(text) + 1).map(sorted)
    return cuts.map(lambda at: [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)])


def joined(pieces: list[Piece]) -> tuple[str, str]:
    """(thinking, answer) of pieces, which must be in order and not empty."""
    phases = [piece.phase for piece in pieces]
    assert phases == sorted(phases, reverse=True)
    assert all(piece.text for piece in pieces)
    thinking, answer = ("".join(p.text for p in pieces if p.phase == at) for at in ("thinking", "answer"))
    return thinking, answer


def streamed(chunks: list[str]) -> tuple[str, str]:
    parser = ThinkParser()
    return joined([piece for chunk in chunks for piece in parser.feed(chunk)] + parser.flush())


CASES = {
    "the card's template": ("<think>\nHm.\n</think>\nIt is 85.", "Hm.", "It is 85."),
    "nothing": ("", "", ""),
    "only white space": (" \n ", "", ""),
    "no thinking": ("It is 85.\n", "", "It is 85.\n"),
    "no thinking, indented": ("\n\n    x = 1", "", "    x = 1"),
    "white space before the tag": (" \n\t<think>a</think>b", "a", "b"),
    "text before the tag": ("So <think>a</think>b", "", "So <think>a</think>b"),
    "half an opening tag": ("<thin", "", "<thin"),
    "half an opening tag, indented": (" \n <thin", "", " <thin"),
    "almost an opening tag": ("<thinking>a</think>", "", "<thinking>a</think>"),
    "a closing tag first": ("</think>a", "", "</think>a"),
    "unclosed": ("<think>\nand so on", "and so on", ""),
    "unclosed, half a tag": ("<think>a </thin", "a </thin", ""),
    "unclosed, nothing inside": ("<think> \n", "", ""),
    "nothing inside": ("<think>\n</think>\nb", "", "b"),
    "nothing after": ("<think>a</think>\n \n", "a", ""),
    "a close in quotes": ('<think>"</think>" ends it</think>b', '"', '" ends it</think>b'),
    "a close in code": ("<think>`</think>`\nb", "`", "`\nb"),
    "an open inside": ("<think>a <think> b</think>c", "a <think> b", "c"),
    "tags in the answer": ("<think>a</think>b <think>c</think>d", "a", "b <think>c</think>d"),
    "a second close": ("<think>a</think>b</think>c", "a", "b</think>c"),
    "tags apart by a letter": ("<think>a</thinx></think>b", "a</thinx>", "b"),
    "a tag begun twice": ("<think>a</th</think>b", "a</th", "b"),
    "control spelling is text": ("[THINK]a[/THINK]b", "", "[THINK]a[/THINK]b"),
    "indentation": ("<think>a</think>\n \n    x = 1\n", "a", "    x = 1\n"),
    "a space after the close": ("<think>a</think> b ", "a", " b "),
    "lines of carriage returns": ("<think>\r\na\r\n</think>\r\n\r\nb", "a", "b"),
    "inner white space": ("<think> a \n\n b </think> c \n\n d ", "a \n\n b", " c \n\n d "),
}


@pytest.mark.parametrize(("text", "thinking", "answer"), CASES.values(), ids=CASES.keys())
def test_parsing_rules(text: str, thinking: str, answer: str):
    assert parse(text) == (thinking, answer)
    assert streamed([text]) == (thinking, answer)
    assert streamed(list(text)) == (thinking, answer)
    for cut in range(len(text) + 1):
        assert streamed([text[:cut], text[cut:]]) == (thinking, answer)


@settings(max_examples=500)
@given(st.data(), transcripts)
def test_any_chunking_equals_the_reference(data: st.DataObject, text: str):
    assert streamed(data.draw(chunkings(text))) == parse(text)


@given(transcripts)
def test_at_most_seven_characters_are_held_back(text: str):
    parser, pieces = ThinkParser(), []
    for at, character in enumerate(text, start=1):
        pieces += parser.feed(character)
        for shown, whole in zip(joined(pieces), parse(text[:at]), strict=True):
            assert len(whole.removeprefix(shown).strip()) <= 7


@given(transcripts)
def test_the_phase_changes_once(text: str):
    parser, phases = ThinkParser(), ["thinking"]
    for character in text:
        pieces = parser.feed(character)
        phases.append(parser.phase)
        assert all(piece.phase <= phases[-2] and piece.phase >= phases[-1] for piece in pieces)
    assert phases == sorted(phases, reverse=True)


def test_phase_is_answer_if_there_is_no_thinking():
    parser = ThinkParser()
    parser.feed("8")
    assert parser.phase == "answer"


@given(st.text("ab", max_size=6), st.text("ab", min_size=1, max_size=4))
def test_unfinished_is_the_longest_suffix_that_begins_the_tag(text: str, tag: str):
    assert unfinished(text, tag) == max(n for n in range(len(tag)) if text.endswith(tag[:n]))


def marked(items: list[str]) -> tuple[str, str]:
    """Feed text, with "\ue000" and "\ue001" standing for the control tokens."""
    parser, pieces = ThinkParser(tags="control"), []
    for item in items:
        if item == "\ue000":
            parser.mark_open()
        elif item == "\ue001":
            parser.mark_close()
        else:
            pieces += parser.feed(item)
    return joined(pieces + parser.flush())


def parse_marked(text: str) -> tuple[str, str]:
    found = re.fullmatch(r"[\s\ue001]*\ue000([^\ue001]*)(?:\ue001(.*))?", text, re.DOTALL)
    thinking, answer = found.groups(default="") if found else ("", text)
    answer = re.sub("[\ue000\ue001]", "", answer)
    return thinking.replace("\ue000", "").strip(), parse(f"<think></think>{answer}")[1]


@given(st.lists(st.sampled_from(["\ue000", "\ue001", *FRAGMENTS]), max_size=12))
def test_control_tags_follow_the_same_rules(items: list[str]):
    assert marked(items) == parse_marked("".join(items))


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["\ue000", "\na\n", "\ue001", "\n\n  b"], ("a", "  b")),
        ([" ", "\ue000", "a </think> b", "\ue001", "c"], ("a </think> b", "c")),
        (["<think>", "a", "</think>", "b"], ("", "<think>a</think>b")),
        (["\ue001", "a"], ("", "a")),
        (["a", "\ue000", "b", "\ue001", "c"], ("", "abc")),
        (["\ue000", "a", "\ue001", "b", "\ue000", "c", "\ue001", "d"], ("a", "bcd")),
        (["\ue000", "a"], ("a", "")),
    ],
)
def test_control_tags(items: list[str], expected: tuple[str, str]):
    assert marked(items) == expected == parse_marked("".join(items))
