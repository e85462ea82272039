"""Lines broken between words, as a terminal of that width would show them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from magistral_mlx.talk.display import _wrapped
from magistral_mlx.talk.wrapping import Lines

COLUMNS = 12


def screen(text: str, *, piece: int = 1) -> list[str]:
    """The lines that a terminal shows, of text that comes in pieces."""
    lines, fed = Lines(), ""
    for at in range(0, len(text), piece):
        fed += lines.feed(text[at : at + piece], columns=COLUMNS)
    shown = [""]
    for part in re.findall(r"\x1b\[\d+D\x1b\[K|\n|.", fed):
        if part == "\n":
            shown.append("")
        elif part.startswith("\x1b"):
            shown[-1] = erased(shown[-1], int(re.findall(r"\d+", part)[0]))
        else:
            shown[-1] += part
    return shown


def erased(line: str, columns: int) -> str:
    while columns > 0:
        columns -= cell_len(line[-1])
        line = line[:-1]
    return line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two three four", ["one two ", "three four"]),
        ("one\n\ntwo", ["one", "", "two"]),
        ("exactly ten and", ["exactly ten", "and"]),
        ("- incomprehensibilities", ["- ", "incomprehensibilities"]),
        ("incomprehensibilities end", ["incomprehensibilities", "end"]),
        ("    incomprehensibilities", ["    incomprehensibilities"]),
        (
            "```py\nx = 1 + 2 + 3 + 4\n```\none two three",
            ["```py", "x = 1 + 2 + 3 + 4", "```", "one two ", "three"],
        ),
        ("二三四五六七八九", ["二三四五六", "七八九"]),
        ("48에 37을 더하면", ["48에 37을 ", "더하면"]),
    ],
)
def test_lines_break_between_words(text: str, shown: list[str]):
    assert screen(text) == shown


@given(text=st.text(st.sampled_from("ab 二`\n"), max_size=60), piece=st.integers(1, 9))
def test_only_spaces_are_lost_however_the_text_is_chunked(text: str, piece: int):
    shown = screen(text, piece=piece)
    assert shown == screen(text, piece=60)
    assert "".join(shown).replace(" ", "") == re.sub(r"\s", "", text)


@pytest.mark.parametrize(
    ("text", "columns", "shown"),
    [
        ("read 3 tokens in 0.1 s · answered 1 token", 30, "read 3 tokens in 0.1 s ·\nanswered 1 token"),
        ("read 3 tokens in 0.1 s · answered", 10, "read 3 tokens in 0.1 s\n· answered"),
        ("/help lists the commands", 12, "/help lists\nthe commands"),
    ],
)
def test_notes_are_wrapped_and_figures_keep_their_units(text: str, columns: int, shown: str):
    assert _wrapped(text, columns) == shown


@given(st.lists(st.text("abc", min_size=1, max_size=COLUMNS - 1), max_size=12))
def test_short_words_stay_whole_and_within_the_columns(words: list[str]):
    shown = screen(" ".join(words))
    assert all(len(line) < COLUMNS for line in shown)
    assert " ".join(shown).split() == words
