"""tekken.json → tokenizer.json: the same ids in the file format that mlx-lm, LM Studio and transformers read.

Both are byte-level BPE with the same pattern. They differ in how a merge is chosen: tiktoken, which reads
tekken.json, merges the two neighbours whose concatenation has the lowest rank, wherever that is split;
tokenizer.json has an ordered list of pairs. So every pair that makes a piece is listed, by the piece's rank.

Knows both formats. Does not know chat templates (`sidecars`), nor the tokenizers library, which only the
tests use, to compare with.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The meaning of the ids of a tekken.json: first control tokens, then pieces of text."""

    specials: list[str]
    pieces: list[bytes]
    pattern: str
    """The regular expression of the pre-tokenizer: it splits text into words, and no piece spans two."""

    @classmethod
    def from_tekken(cls, tekken: dict[str, Any]) -> Self:
        """Read a tekken.json as mistral_common does.

        Its list of pieces may be longer than the vocabulary, and is truncated; an id of the control range
        without a name is `<SPECIAL_n>`; a file of v7 or older may leave all names to mistral_common.
        """
        config = tekken["config"]
        reserved: int = config["default_num_special_tokens"]
        specials = [f"<SPECIAL_{i}>" for i in range(reserved)]
        for token in tekken.get("special_tokens") or _default_special_tokens():
            specials[token["rank"]] = str(getattr(token["token_str"], "value", token["token_str"]))
        rows = tekken["vocab"][: config["default_vocab_size"] - reserved]
        pieces = [base64.b64decode(row["token_bytes"]) for row in rows]
        return cls(specials=specials, pieces=pieces, pattern=config["pattern"])


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of a tokenizer.json.

    `<s>` is added where the caller requests special tokens, that is, to a bare prompt. A chat template has
    its own, and its callers then request none.
    """
    specials, letters = vocabulary.specials, _letters()
    pieces = [piece.decode("latin-1").translate(letters) for piece in vocabulary.pieces]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": vocabulary.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, text) for i, text in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_only]},
        "post_processor": _begin_of_text("<s>", specials.index("<s>")),
        "decoder": bytes_only,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a piece is that piece, as in tiktoken
            "vocab": {text: i for i, text in enumerate([*specials, *pieces])},
            "merges": _merges(pieces),
        },
    }


def _merges(pieces: Sequence[str]) -> list[str]:
    """Every pair of pieces that makes a piece, in the order of the ranks of the pieces made."""
    rank = {piece: i for i, piece in enumerate(pieces)}
    merges: list[str] = []
    for piece in pieces:
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        pairs = [(rank[left], rank[right]) for left, right in cuts if left in rank and right in rank]
        merges += [f"{pieces[left]} {pieces[right]}" for left, right in sorted(pairs)]
    return merges


def _letters() -> dict[int, str]:
    """GPT-2's character for each byte: itself if printable, else one from U+0100 on. None is a space."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printing)
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _added(i: int, text: str) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": text, **plain, "special": True}


def _begin_of_text(text: str, i: int) -> dict[str, Any]:
    bos = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": kind}} for kind, which in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]}},
    }


def _default_special_tokens() -> Any:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    return Tekkenizer.DEPRECATED_SPECIAL_TOKENS
