"""A grammar for the answer only: it applies from the first byte of the answer, whatever the reasoning."""

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
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 999},
        "b": {"type": "string", "maxLength": 9},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
JSON = Grammar.from_schema(SCHEMA)


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer: Open) -> Callable[[str], Vocabulary]:
    found: dict[str, Vocabulary] = {}
    return lambda version: found.setdefault(version, Vocabulary(tiny_tokenizer(version)))


@pytest.fixture(scope="module")
def full(full_tokenizer: Open) -> Vocabulary:
    return Vocabulary(full_tokenizer("v11"))


class Writer:
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

    def write(self, token: int) -> None:
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


def random_ids_of(tokenizer: Tokenizer, text: str, draw: random.Random) -> list[int]:
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
def test_any_reply_ends_in_a_valid_answer(vocabulary: Callable[[str], Vocabulary], version: str, think: bool):
    """A model that follows a given text where the mask allows it, and otherwise takes any allowed id."""
    vocab = vocabulary(version)
    tokenizer = vocab.tokenizer
    tags = tokenizer.think_ids
    thought = 0
    for seed in range(25):
        draw = random.Random(seed)
        text = draw.choice(THOUGHTS)
        preferred = random_ids_of(tokenizer, text, draw)
        if tags:
            plain = text.replace(OPEN, "").replace(CLOSE, "")
            preferred = [tags[0], *tokenizer.encode(plain), *([tags[1]] if CLOSE in text else [])]
        writer = Writer(Constraint(JSON, vocab, think=think), tokenizer)
        while not writer.ids or writer.ids[-1] != EOS:
            next_preferred = preferred.pop(0) if preferred else None
            if not preferred and writer.transcript.can_close and draw.random() < 0.2:
                writer.close()
                continue
            token = (
                next_preferred if next_preferred in writer.allowed else draw.choice(sorted(writer.allowed))
            )
            writer.write(token)
            assert len(writer.ids) < 900
        writer.transcript.flush()
        thought += bool(writer.transcript.thinking)
        jsonschema.validate(json.loads(writer.transcript.answer), SCHEMA)
    assert (thought > 8) == think


def allowed_after(constraint: Constraint, ids: list[int]) -> set[int]:
    """The ids that are allowed after `ids`."""
    constraint.mask()
    for token in ids:
        constraint.accept(token)
    constraint._last = None
    return set(ids_of(int.from_bytes(constraint.mask() or b"", "little")))


def id_of(tokenizer: Tokenizer, piece: bytes) -> int:
    return tokenizer.pieces.index(piece)


def test_id_that_ends_the_tag_and_begins_the_answer(full: Vocabulary):
    """`>The` ends the tag and begins the answer: allowed only if the grammar accepts `The`."""
    tokenizer = full.tokenizer
    half = [*tokenizer.encode(f"{OPEN}\nso 85\n</"), *tokenizer.encode("think")]
    straddling = {piece: i for i, piece in enumerate(tokenizer.pieces) if piece and piece.startswith(b">")}
    assert {b">", b">\n", b">\n\n", b">The"} <= straddling.keys()
    free = set(range(CONTROLS, 131072))
    as_json = allowed_after(Constraint(JSON, full), half)
    refused = free - as_json
    assert refused <= set(straddling.values())
    assert straddling[b">The"] in refused
    assert not {straddling[b">"], straddling[b">\n"], straddling[b">\n\n"]} & refused
    for piece, token in straddling.items():
        assert (token in refused) == (
            not b"\n\n{".startswith(piece[1:]) and piece[1:].lstrip(b"\n") != b"{"
        ), piece
    as_regex = Constraint(Grammar.from_regex("The [a-z]{3}"), full)
    assert straddling[b">The"] in allowed_after(as_regex, half)
    as_regex.accept(straddling[b">The"])
    assert id_of(tokenizer, b" the") in allowed_after(as_regex, [])


def test_reasoning_is_unconstrained_but_must_end(full: Vocabulary):
    """An unfinished tag forbids nothing; the end of text and tool calls are not allowed before the answer."""
    constraint, tokenizer = Constraint(JSON, full), full.tokenizer
    free = set(range(CONTROLS, 131072))
    assert allowed_after(constraint, tokenizer.encode(f"{OPEN}\nCarry")) == free
    assert allowed_after(constraint, tokenizer.encode(" </")) == free
    assert allowed_after(constraint, tokenizer.encode("b> it")) == free
    assert constraint.mask() is None
    assert not constraint.done


def test_reply_may_skip_the_reasoning(full: Vocabulary):
    tokenizer = full.tokenizer
    both = allowed_after(Constraint(JSON, full), [])
    only = allowed_after(Constraint(JSON, full, think=False), [])
    assert only < both
    assert {tokenizer.pieces[i] for i in both - only} >= {b"<", b"<th", b" "}
    assert all((tokenizer.pieces[i] or b"").lstrip()[:1] in {b"", b"<"} for i in both - only)
    begun = Constraint(JSON, full)
    assert allowed_after(begun, tokenizer.encode("\n")) >= {id_of(tokenizer, b"{"), id_of(tokenizer, b"<")}
    assert id_of(tokenizer, b"<") not in allowed_after(begun, [id_of(tokenizer, b"{")])


def test_late_tag_belongs_to_the_answer(vocabulary: Callable[[str], Vocabulary]):
    """Elsewhere it is dropped after a forced close; here a string of the schema would lose its middle."""
    vocab = vocabulary("v11")
    writer = Writer(Constraint(JSON, vocab), vocab.tokenizer)
    for token in vocab.tokenizer.encode(f"{OPEN}a"):
        writer.write(token)
    writer.close()
    for token in [*vocab.tokenizer.encode('{"a": 1, "b": "</think>"}'), EOS]:
        writer.write(token)
    writer.transcript.flush()
    assert json.loads(writer.transcript.answer) == {"a": 1, "b": CLOSE}
    assert writer.constraint.done
