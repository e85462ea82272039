"""A grammar for the answer only: it applies from the answer's first byte, whatever the reasoning."""

import json
import random
from collections.abc import Callable

import jsonschema
import pytest

from magistral_mlx.structured.constraint import Constraint
from magistral_mlx.structured.grammar import Grammar, Vocabulary
from magistral_mlx.text.thinking import CLOSE, OPEN
from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.text.transcript import Transcript
from tests.structured.test_grammar import ids_of
from tests.tokenizers import CONTROLS

Open = Callable[[str], Tokenizer]
EOS = 2
WANTED = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 999},
        "b": {"type": "string", "maxLength": 9},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
JSON = Grammar.from_schema(WANTED)


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer: Open) -> Callable[[str], Vocabulary]:
    found: dict[str, Vocabulary] = {}
    return lambda version: found.setdefault(version, Vocabulary(tiny_tokenizer(version)))


@pytest.fixture(scope="module")
def full(full_tokenizer: Open) -> Vocabulary:
    return Vocabulary(full_tokenizer("v11"))


class Writing:
    """Passes ids to transcript and constraint as `reply.ReplyBuilder` does, and keeps the current mask."""

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer) -> None:
        self.constraint, self.tokenizer = constraint, tokenizer
        self.transcript = Transcript(tokenizer)
        self.ids = list[int]()
        self.allowed = set[int]()
        self.update()

    def update(self) -> None:
        mask = self.constraint.mask()
        if mask is not None:
            self.allowed = set(ids_of(int.from_bytes(mask, "little")))
        assert self.constraint.mask() is None  # nothing has changed

    def say(self, token: int) -> None:
        assert token in self.allowed
        self.ids.append(token)
        self.transcript.feed(token)
        if token != EOS:
            self.constraint.accept(token)
            self.update()
            assert (self.constraint._state == "answer") == (self.transcript.phase == "answer")

    def close(self) -> None:
        ids = self.transcript.closing_ids(self.tokenizer)
        self.transcript.force_close(ids, late=False)
        self.constraint.close_thinking()
        self.ids += ids
        self.update()


def cut(tokenizer: Tokenizer, text: str, draw: random.Random) -> list[int]:
    """The ids of a text, as the tokenizer encodes it or in pieces of any size."""
    ids = list[int]()
    while text:
        size = draw.choice([1, 3, 20, 200])
        ids += tokenizer.encode(text[:size])
        text = text[size:]
    return ids


THOUGHTS = [
    f"{OPEN}\nCarry the one.\n{CLOSE}\n\n",
    f"{OPEN}a </thin < </ b {CLOSE}The answer: ",
    f"\n {OPEN}{CLOSE}",
    f"{OPEN}\n한국 ",
    f" {OPEN}a quoted '</",
    "The answer is ",
    "",
]


@pytest.mark.parametrize("version", ["v7", "v11", "v13"])
@pytest.mark.parametrize("think", [True, False])
def test_any_reply_ends_in_an_answer_of_its_kind(
    vocabulary: Callable[[str], Vocabulary], version: str, think: bool
):
    """A model that follows a given text where the mask allows it, and otherwise takes any allowed id."""
    words = vocabulary(version)
    tokenizer = words.tokenizer
    tags = tokenizer.think_ids
    thought = 0
    for seed in range(25):
        draw = random.Random(seed)
        text = draw.choice(THOUGHTS)
        wish = cut(tokenizer, text, draw)
        if tags:
            plain = text.replace(OPEN, "").replace(CLOSE, "")
            wish = [tags[0], *tokenizer.encode(plain), *([tags[1]] if CLOSE in text else [])]
        writing = Writing(Constraint(JSON, words, think=think), tokenizer)
        while not writing.ids or writing.ids[-1] != EOS:
            liked = wish.pop(0) if wish else None
            if not wish and writing.transcript.can_close and draw.random() < 0.2:
                writing.close()
                continue
            token = liked if liked in writing.allowed else draw.choice(sorted(writing.allowed))
            writing.say(token)
            assert len(writing.ids) < 900
        writing.transcript.flush()
        thought += bool(writing.transcript.thinking)
        jsonschema.validate(json.loads(writing.transcript.answer), WANTED)
    assert (thought > 8) == think


def said(constraint: Constraint, ids: list[int]) -> set[int]:
    """The ids that are allowed after `ids`."""
    constraint.mask()
    for token in ids:
        constraint.accept(token)
    constraint._last = None
    return set(ids_of(int.from_bytes(constraint.mask() or b"", "little")))


def spelled(tokenizer: Tokenizer, piece: bytes) -> int:
    return tokenizer.pieces.index(piece)


def test_an_id_that_closes_and_begins_the_answer(full: Vocabulary):
    """`>The` ends the tag and begins the answer: allowed only if the grammar accepts `The`."""
    tokenizer = full.tokenizer
    half = [*tokenizer.encode(f"{OPEN}\nso 85\n</"), *tokenizer.encode("think")]
    straddling = {piece: i for i, piece in enumerate(tokenizer.pieces) if piece and piece.startswith(b">")}
    assert {b">", b">\n", b">\n\n", b">The"} <= straddling.keys()
    free = set(range(CONTROLS, 131072))
    as_json = said(Constraint(JSON, full), half)
    refused = free - as_json
    assert refused <= set(straddling.values())
    assert straddling[b">The"] in refused
    assert not {straddling[b">"], straddling[b">\n"], straddling[b">\n\n"]} & refused
    for piece, token in straddling.items():
        assert (token in refused) == (
            not b"\n\n{".startswith(piece[1:]) and piece[1:].lstrip(b"\n") != b"{"
        ), piece
    as_words = Constraint(Grammar.from_regex("The [a-z]{3}"), full)
    assert straddling[b">The"] in said(as_words, half)
    as_words.accept(straddling[b">The"])
    assert spelled(tokenizer, b" the") in said(as_words, [])


def test_reasoning_is_free_but_has_to_end(full: Vocabulary):
    """Half a tag that turns out to be none forbids nothing; the end of text and tool calls must wait for the
    answer.
    """
    constraint, tokenizer = Constraint(JSON, full), full.tokenizer
    free = set(range(CONTROLS, 131072))
    assert said(constraint, tokenizer.encode(f"{OPEN}\nCarry")) == free
    assert said(constraint, tokenizer.encode(" </")) == free
    assert said(constraint, tokenizer.encode("b> it")) == free
    assert constraint.mask() is None
    assert not constraint.done


def test_a_reply_that_skips_the_reasoning(full: Vocabulary):
    tokenizer = full.tokenizer
    both = said(Constraint(JSON, full), [])
    only = said(Constraint(JSON, full, think=False), [])
    assert only < both
    assert {tokenizer.pieces[i] for i in both - only} >= {b"<", b"<th", b" "}
    assert all((tokenizer.pieces[i] or b"").lstrip()[:1] in {b"", b"<"} for i in both - only)
    begun = Constraint(JSON, full)
    assert said(begun, tokenizer.encode("\n")) >= {spelled(tokenizer, b"{"), spelled(tokenizer, b"<")}
    assert spelled(tokenizer, b"<") not in said(begun, [spelled(tokenizer, b"{")])


def test_a_late_tag_is_the_answers(vocabulary: Callable[[str], Vocabulary]):
    """After a forced close it is dropped elsewhere; a string of a schema would lose its middle."""
    words = vocabulary("v11")
    writing = Writing(Constraint(JSON, words), words.tokenizer)
    for token in words.tokenizer.encode(f"{OPEN}a"):
        writing.say(token)
    writing.close()
    for token in [*words.tokenizer.encode('{"a": 1, "b": "</think>"}'), EOS]:
        writing.say(token)
    writing.transcript.flush()
    assert json.loads(writing.transcript.answer) == {"a": 1, "b": CLOSE}
    assert writing.constraint.done
