"""Which ids a grammar allows: random walks through its masks, validated by jsonschema and by `re`."""

import json
import random
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magistral_mlx import SchemaError
from magistral_mlx.structured import grammar as grammar_module
from magistral_mlx.structured.grammar import MAX_CHARACTERS, Grammar, Matcher, Vocabulary
from magistral_mlx.text.tokenizer import Tokenizer
from tests.schemas import schema

Open = Callable[[str], Tokenizer]


@pytest.fixture(scope="module")
def tiny(tiny_tokenizer: Open) -> Vocabulary:
    return Vocabulary(tiny_tokenizer("v11"))


@pytest.fixture(scope="module")
def full(full_tokenizer: Open) -> Vocabulary:
    return Vocabulary(full_tokenizer("v11"))


def ids_of(mask: int) -> list[int]:
    return [at for at, bit in enumerate(reversed(f"{mask:b}")) if bit == "1"]


def walk(matcher: Matcher, vocabulary: Vocabulary, draw: random.Random, most: int) -> str:
    """A text of ids sampled uniformly from those allowed; fails if it is longer than the limit."""
    ids = list[int]()
    for _ in range(most):
        token = draw.choice(ids_of(matcher.mask()))
        if token == vocabulary.eos_id:
            return vocabulary.tokenizer.decode(ids)
        assert matcher.accept(token)
        ids.append(token)
    raise AssertionError(f"no end after {most} ids")


def accepts(matcher: Matcher, text: str) -> bool:
    """Whether the whole text is allowed, and may end there."""
    matcher.reset()
    if not matcher.would_accept(text.encode()):
        return False
    matcher.accept_bytes(text.encode())
    return bool(matcher.mask() >> 2 & 1)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_every_walk_through_a_schema_is_valid(tiny: Vocabulary, seed: int):
    draw = random.Random(seed)
    wanted, longest = schema(draw)
    text = walk(Matcher(Grammar.from_schema(wanted), tiny), tiny, draw, longest + 3)
    jsonschema.validate(json.loads(text), wanted, format_checker=jsonschema.FormatChecker())


def test_walks_through_the_real_vocabulary(full: Vocabulary):
    for seed in range(8):
        draw = random.Random(seed)
        wanted, longest = schema(draw)
        text = walk(Matcher(Grammar.from_schema(wanted), full), full, draw, longest + 3)
        jsonschema.validate(json.loads(text), wanted)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{1,3}",
        r"^[a-c]{3}$",
        "(?:yes|no|한국)",
        r"a/b\n{1,2}c",
        "(?x) a b # said",
        "",
        r"\"[^\"\\]{0,4}\"",
    ],
)
def test_every_walk_through_a_regex_matches(tiny: Vocabulary, pattern: str):
    draw = random.Random(pattern)
    for _ in range(5):
        text = walk(Matcher(Grammar.from_regex(pattern), tiny), tiny, draw, 60)
        assert re.fullmatch(pattern, text.lstrip("\n"))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8))
@settings(max_examples=40)
def test_empty_schema_allows_any_json(tiny: Vocabulary, value: Any):
    """In its usual forms: in one line, or indented."""
    matcher = Matcher(Grammar.from_schema({}), tiny)
    for indent in (None, 2):
        text = json.dumps(value, ensure_ascii=False, indent=indent)
        if "\x7f" not in text:
            assert accepts(matcher, text), text


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]}


def test_allowed_and_forbidden_texts(tiny: Vocabulary):
    matcher = Matcher(Grammar.from_schema(OBJECT), tiny)
    good = ('{"a": 1}', '\n{"a":1}', '\n\n{"a" : -1 , "b": [ {} ]}', '{\n  "a": 1\n}')
    bad = ('\n\n\n{"a":1}', ' {"a":1}', '{"a":1} ', '{  "a":1}', '{"b":1}', '{"a":1.5}', '{"a":01}', '{"a":1')
    assert [text for text in good if not accepts(matcher, text)] == []
    assert [text for text in bad if accepts(matcher, text)] == []


def test_done_if_nothing_may_follow(tiny: Vocabulary):
    matcher = Matcher(Grammar.from_schema(OBJECT), tiny)
    assert not matcher.done
    assert accepts(matcher, '{"a": 1}')
    assert matcher.done
    assert matcher.mask() == 1 << tiny.eos_id
    matcher.reset()
    assert not matcher.done
    number = Matcher(Grammar.from_schema({"type": "integer"}), tiny)
    assert accepts(number, "12")
    assert not number.done  # another digit may come


def test_control_tokens_are_allowed_only_where_named(tiny: Vocabulary):
    anything = Matcher(Grammar.from_regex("(?s:.*)"), tiny)
    assert [i for i in ids_of(anything.mask()) if i < 1000] == [tiny.eos_id]
    call = Matcher(Grammar.from_lark('start: <[9]> "add" <[32]> json\njson: %json {"type": "integer"}'), tiny)
    assert ids_of(call.mask()) == [9]
    assert call.accept(9)
    call.accept_bytes(b"add")
    assert ids_of(call.mask()) == [32]


UNSUPPORTED = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"not": {"type": "string"}}, "not"),
    ({"if": {}, "then": {}}, '"if", "then"'),
    ({"propertyNames": {"pattern": "a"}}, "propertyNames"),
    ({"type": "strin"}, "strin"),
    ({"type": "string", "format": "iri"}, "iri"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"$ref": "https://example.com/a"}, "example.com"),
    ({"$ref": "#/nowhere"}, "nowhere"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
]


@pytest.mark.parametrize(("wanted", "named"), UNSUPPORTED)
def test_unsupported_schemas_are_refused_by_keyword(tiny: Vocabulary, wanted: dict[str, Any], named: str):
    with pytest.raises(SchemaError, match=re.escape(named)):
        Matcher(Grammar.from_schema(wanted), tiny)


@pytest.mark.parametrize("pattern", ["(", "a(?=b)", r"\bx", "[z-a]"])
def test_invalid_regex_is_refused(tiny: Vocabulary, pattern: str):
    with pytest.raises(SchemaError, match="regex"):
        Matcher(Grammar.from_regex(pattern), tiny)


IMPOSSIBLE = [
    {"type": "string", "minLength": 5, "maxLength": 3},
    {"type": "integer", "minimum": 5, "maximum": 4},
    {"type": "integer", "minimum": 10, "maximum": 13, "multipleOf": 7},
    {"enum": []},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
]


@pytest.mark.parametrize("wanted", IMPOSSIBLE)
def test_impossible_schema_is_refused(tiny: Vocabulary, wanted: dict[str, Any]):
    with pytest.raises(SchemaError):
        Matcher(Grammar.from_schema(wanted), tiny)


def test_impossible_regex_is_refused(tiny: Vocabulary):
    with pytest.raises(SchemaError):
        Matcher(Grammar.from_regex(r"[^\s\S]"), tiny)


def cyclic() -> dict[str, Any]:
    found: dict[str, Any] = {"type": "array"}
    found["items"] = found
    return found


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        found = {"type": "array", "items": found}
    return found


HOSTILE: list[dict[str, Any]] = [
    cyclic(),
    nested(200),
    nested(20_000),
    {"enum": ["x" * MAX_CHARACTERS]},
    {"type": "string", "default": object()},
    {"type": "number", "maximum": float("nan")},
    {"allOf": [{"anyOf": [{"pattern": f"a{{0,{i * j}}}"} for i in range(9)]} for j in range(9)]},
    {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvw"]},
]


@pytest.mark.parametrize("wanted", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_schemas_are_refused(tiny: Vocabulary, wanted: dict[str, Any]):
    with pytest.raises(SchemaError):
        Matcher(Grammar.from_schema(wanted), tiny)


@pytest.mark.parametrize("pattern", ["a" * (MAX_CHARACTERS + 1), 7])
def test_invalid_and_too_large_patterns_are_refused(pattern: str):
    with pytest.raises(SchemaError):
        Grammar.from_regex(pattern)


@pytest.mark.parametrize(
    "pattern", ["((a{0,999}){0,999}){0,999}b" * 40, "(a|b)*c(a|b){500}", "(.*a.*b)*f{3,900}"]
)
def test_hostile_patterns_are_followed_or_refused(tiny: Vocabulary, pattern: str):
    try:
        matcher = Matcher(Grammar.from_regex(pattern), tiny)
        for _ in range(30):
            assert matcher.accept(random.Random(0).choice(ids_of(matcher.mask() & ~(1 << tiny.eos_id))))
    except SchemaError as error:
        assert "too much" in str(error)  # noqa: PT017 -- either is right


def test_schema_may_have_many_patterns_or_combine_a_few(tiny: Vocabulary):
    apart = {f"p{i}": {"type": "string", "pattern": f"^a{i}$"} for i in range(30)}
    Matcher(Grammar.from_schema({"type": "object", "properties": apart}), tiny)
    both = {"allOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "b$"}]}
    assert accepts(Matcher(Grammar.from_schema(both), tiny), '"aab"')


def test_recursive_schema_allows_deep_nesting(tiny: Vocabulary):
    node = {"type": "array", "items": {"$ref": "#/$defs/node"}}
    matcher = Matcher(Grammar.from_schema({"$defs": {"node": node}, "$ref": "#/$defs/node"}), tiny)
    assert accepts(matcher, "[" * 50 + "]" * 50)
    assert not accepts(matcher, "[1]")


def test_error_without_the_extra_names_it(tiny: Vocabulary, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(grammar_module, "_llguidance", cache(grammar_module._llguidance.__wrapped__))
    with pytest.raises(SchemaError, match=r'pip install "magistral_mlx\[structured\]"'):
        Matcher(Grammar.from_schema({}), tiny)
    with pytest.raises(SchemaError, match=r"structured"):
        Grammar.from_regex("a")


@pytest.mark.parametrize("wrong", [{"allOf": 3}, {"patternProperties": 5}, {"type": "object", "allOf": {}}])
def test_keywords_of_a_wrong_type_are_refused(tiny: Vocabulary, wrong: dict[str, object]):
    with pytest.raises(SchemaError):
        Matcher(Grammar.from_schema(wrong), tiny)


def test_pattern_with_a_lone_surrogate_is_refused():
    with pytest.raises(SchemaError, match="Expected a regular expression"):
        Grammar.from_regex("\ud800")
