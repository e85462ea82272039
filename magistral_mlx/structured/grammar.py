"""Which ids may come next so that a text matches a JSON schema, a regular expression or a Lark grammar.

Knows llguidance, and the vocabulary as bytes. Does not know phases (`constraint`), Python values (`shape`) or
arrays. Input may be untrusted: its size is limited here, the work of each step by llguidance.

llguidance is imported on first use: it is the extra `structured`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self, cast

from magistral_mlx.errors import SchemaError
from magistral_mlx.text.thinking import CLOSE, OPEN
from magistral_mlx.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_CHARACTERS = 50_000
"""Maximum characters of a pattern or a grammar (which holds its schema): fifty pages."""

_LEXER_FUEL = 100_000
"""llguidance's lexer fuel for compiling a grammar: a tenth of its default, which may run for seconds."""

LEAD = r"LEAD: /\n{1,2}/"
"""Optional newlines between the closing tag and the answer. The transcript strips them."""

_MAX_JOINED = 10
_REFERENCES = {"$ref", "anyOf", "oneOf"}

_WHITE_SPACE = r"\x20|\n\x20{0,32}"
"""White space between JSON tokens: none, one space, or a newline with indentation. Unlimited, a model might
never stop emitting it."""

_POSITION = re.compile(r"^at \d+\(\d+\): ")
"""A position in the Lark text that we generate: meaningless to the user."""

_OPEN, _CLOSE = OPEN.encode(), CLOSE.encode()


@dataclass(frozen=True, slots=True)
class Regex:
    """The whole answer matches this regular expression: Rust's syntax, which has no look-around."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text must match, in llguidance's dialect of Lark. `Matcher` follows it."""

    lark: str

    @classmethod
    def from_schema(cls, schema: Mapping[str, Any]) -> Self:
        """JSON that matches a JSON schema (2020-12). Keys come in the order of `properties`."""
        return cls.from_lark(f"start: LEAD? json\n{LEAD}\njson: {json_rule(schema)}")

    @classmethod
    def from_regex(cls, pattern: str) -> Self:
        """Text that a regular expression matches as a whole."""
        try:
            quoted = _llguidance().regex_to_lark(_checked_text(pattern), "")
        except ValueError as error:  # a lone surrogate, say
            raise SchemaError(f"Expected a regular expression, found {pattern!r}: {error}.") from error
        return cls.from_lark(f"start: LEAD? TEXT\n{LEAD}\nTEXT: /{quoted}/")

    @classmethod
    def from_lark(cls, lark: str) -> Self:
        """A grammar, used as it is (no `LEAD` is added); `<[9]>` is the control token with id 9."""
        return cls(_checked_text(lark))


def json_rule(schema: Mapping[str, Any]) -> str:
    """A JSON schema as the right-hand side of a grammar rule."""
    try:
        text = json.dumps({**schema, "x-guidance": {"whitespace_pattern": _WHITE_SPACE}}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"Expected a JSON schema, found what is not JSON: {error}.") from error
    _check_joined(json.loads(text))
    return f"%json {text}"


class Vocabulary:
    """A tokenizer as `Matcher` needs it; building it takes about half a second for 131072 ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pieces = tokenizer.pieces
        self.eos_id = tokenizer.eos_id
        self.opening = cache(self._opening)
        self.closing = cache(self._closing)

    @cached_property
    def engine(self) -> "LLTokenizer":
        return _llguidance().LLTokenizer(_Pieces(self.tokenizer))

    @cached_property
    def byte_ids(self) -> dict[int, int]:
        """Byte → the id of exactly this byte; a tekken vocabulary has all 256."""
        return {piece[0]: i for i, piece in enumerate(self.pieces) if piece and len(piece) == 1}

    @cached_property
    def text(self) -> int:
        """Bits of all ids except control tokens."""
        return (1 << len(self.pieces)) - 1 & ~bits(i for i, piece in enumerate(self.pieces) if piece is None)

    @cached_property
    def space(self) -> int:
        """Bits of the white-space ids."""
        return bits(i for i, piece in enumerate(self.pieces) if piece and piece.isspace())

    def _opening(self, begun: bytes) -> int:
        """Bits of the ids that continue `begun`, an initial part of the opening tag, towards all of it."""
        allowed = 0 if begun else self.space
        for i, piece in self._tag_pieces:
            body = begun + piece if begun else piece.lstrip()
            if _OPEN.startswith(body) or (body.startswith(_OPEN) and _CLOSE not in body):
                allowed |= 1 << i
        return allowed

    def _closing(self, half: int) -> list[tuple[int, bytes]]:
        """The ids that complete the closing tag after its first `half` bytes, with their bytes behind it."""
        rest = _CLOSE[half:]
        whole = [(i, piece.partition(_CLOSE)[2]) for i, piece in self._tag_pieces if _CLOSE in piece]
        return whole + [
            (i, piece[len(rest) :]) for i, piece in self._tag_pieces if half and piece.startswith(rest)
        ]

    @cached_property
    def _tag_pieces(self) -> list[tuple[int, bytes]]:
        """Every id that may contain part of a tag, and few others: scanning the vocabulary takes time."""
        return [
            (i, piece)
            for i, piece in enumerate(self.pieces)
            if piece and (b"<" in piece or b">" in piece or piece in _OPEN)
        ]

    def to_bytes(self, allowed: int) -> bytes:
        """Bits as `Guide.allowed`."""
        return allowed.to_bytes((len(self.pieces) + 7) // 8, "little")


class Matcher:
    """The state of one text that follows a grammar."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        llguidance = _llguidance()
        self._vocabulary = vocabulary
        self._matcher = llguidance.LLMatcher(
            vocabulary.engine,
            llguidance.LLMatcher.grammar_from_lark(grammar.lark),
            limits=llguidance.LLParserLimits(initial_lexer_fuel=_LEXER_FUEL, verbose_errors=False),
            log_level=0,
        )
        self._check("cannot be used")
        if not (self.mask() & ~vocabulary.space or self._matcher.is_accepting()):
            raise SchemaError(
                "Expected a schema that some text matches, found one that nothing matches. Loosen it."
            )

    def mask(self) -> int:
        """Bits of the ids that may come next, the end of text included where the text may end."""
        allowed = int.from_bytes(self._matcher.compute_bitmask(), "little")
        self._check("became too complex")
        if not allowed:
            raise SchemaError(
                "Expected a schema that some text matches, found that no token can come next. Loosen it."
            )
        return allowed

    def accept(self, token: int) -> bool:
        """Consume an id, if it may come next."""
        accepted = self._matcher.try_consume_tokens([token]) == 1
        self._check("became too complex")
        return accepted

    def accept_bytes(self, text: bytes) -> None:
        """Consume the bytes of an id that belong to the answer, after those that end the closing tag."""
        accepted = self._matcher.try_consume_tokens(self._byte_ids(text))
        assert accepted == len(text)

    def would_accept(self, text: bytes) -> bool:
        return self._matcher.validate_tokens(self._byte_ids(text)) == len(text)

    def reset(self) -> None:
        """Back to the beginning of the text."""
        self._matcher.reset()

    @property
    def done(self) -> bool:
        """Whether the text is complete, and nothing can follow it."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def _byte_ids(self, text: bytes) -> list[int]:
        return [self._vocabulary.byte_ids[byte] for byte in text]

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            first, *more = self._matcher.get_error().splitlines()
            reasons = [_POSITION.sub("", first), *(line for line in more if line.startswith("error:"))]
            raise SchemaError(
                f"Expected a schema that the grammar engine can follow, found one that {what}: "
                f"{' '.join(reasons)[:500]}"
            )


class _Pieces:
    """The tokenizer as llguidance needs it. Control tokens have placeholder names and no text."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens: Sequence[bytes] = [
            b"<|%d|>" % i if piece is None else piece for i, piece in enumerate(tokenizer.pieces)
        ]
        self.special_token_ids = [i for i, piece in enumerate(tokenizer.pieces) if piece is None]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def bits(ids: Iterable[int]) -> int:
    """A bit for each id."""
    allowed = 0
    for i in ids:
        allowed |= 1 << i
    return allowed


def _check_joined(schema: object) -> None:
    """Refuse many patterns that may have to match at once: the cost doubles with each."""
    nodes = [schema]
    patterns, joined = 0, False
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += cast("list[object]", node)
        elif isinstance(node, dict):
            keys = cast("dict[str, object]", node)
            patterns += ("pattern" in keys) + _size(keys.get("patternProperties"))
            joined = joined or _size(keys.get("allOf")) > 1
            joined = joined or (bool(keys.keys() & _REFERENCES) and bool(keys.keys() & {"pattern", "allOf"}))
            nodes += keys.values()
    if joined and patterns > _MAX_JOINED:
        raise SchemaError(
            f"Expected at most {_MAX_JOINED} patterns in a schema that joins some (allOf), found {patterns}. "
            "Make one of several."
        )


def _size(value: object) -> int:
    """Number of items of a keyword; 0 if it has a wrong type, which llguidance refuses."""
    return len(cast("Sized", value)) if isinstance(value, (dict, list)) else 0


def _checked_text(text: str) -> str:
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:  # type: ignore[redundant-expr] -- of a user
        found = len(text) if isinstance(text, str) else f"a {type(text).__name__}"  # type: ignore[redundant-expr]
        raise SchemaError(
            f"Expected text of at most {MAX_CHARACTERS} characters, found {found}. Make it smaller."
        )
    return text


@cache
def _llguidance() -> ModuleType:
    try:
        import llguidance  # noqa: PLC0415 -- an extra
    except ImportError as error:
        raise SchemaError(
            "Expected llguidance for structured answers, found it missing: "
            'pip install "magistral_mlx[structured]"'
        ) from error
    return llguidance
