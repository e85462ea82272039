"""Plain completions in OpenAI's legacy format: log-probabilities are parallel lists.

Does not know how replies are generated.
"""

import json
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.wire import TokenLogprob

from .rendering import Delta
from .replies import REASONS, Choice, ChoiceEnd, OpenAIEncoder
from .wire import CompletionRequest

_CONTINUATIONS = {b"", *(bytes([byte]) for byte in range(0x80, 0xC0))}
"""First byte of a token's text that does not begin a new UTF-8 character; empty: the token has no text."""


class CompletionEncoder(OpenAIEncoder):
    """echoes: per prompt, the text put before its choices; empty: no echo."""

    kind, piece_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self, model: str, tokenizer: Tokenizer, request: CompletionRequest, echoes: Sequence[str]
    ) -> None:
        super().__init__(model, tokenizer, request)
        self._echoes = echoes
        self._scored = request.logprobs is not None
        self._tables: dict[int, _Table] = {}

    def opening(self, index: int) -> bytes:
        return self._piece(index, self._echo(index))

    def piece(self, index: int, delta: Delta) -> bytes:
        table = self._table(index)
        return self._piece(index, delta.text, logprobs=json.dumps(table and table.columns([delta])))

    def ending(self, index: int, ended: ChoiceEnd) -> bytes:
        return self._piece(index, "", f'"{REASONS[ended.reason]}"')

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        table = self._table(index)
        logprobs = table and table.columns(choice.deltas)
        text = self._echo(index) + choice.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.reason}

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._n] if self._echoes else ""

    def _table(self, index: int) -> "_Table | None":
        if not self._scored:
            return None
        return self._tables.setdefault(index, _Table(self._tokenizer))

    def _piece(self, index: int, text: str, reason: str = "null", *, logprobs: str = "null") -> bytes:
        text = json.dumps(text, ensure_ascii=False)
        one = f'[{{"index": {index}, "text": {text}, "logprobs": {logprobs}, "finish_reason": {reason}}}]'
        return f"{self._head}{one}}}\n\n".encode()


class _Table:
    """Log-probabilities of a choice as parallel lists; offsets count characters of its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # of the next id
        self._length = 0  # of the text so far

    def columns(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """One entry for each id whose text is sent: none for ids after a stop string or for end of text."""
        self._length += sum(len(one.text) for one in deltas)
        scored = [
            (logprob, self._advance(logprob.id)) for one in deltas for logprob in one.logprobs if logprob
        ]
        rows = [(logprob, at) for logprob, at in scored if at < self._length]
        return {
            "tokens": [self._token(one.id) for one, _ in rows],
            "token_logprobs": [one.logprob for one, _ in rows],
            "top_logprobs": [self._likeliest(one) for one, _ in rows],
            "text_offset": [at for _, at in rows],
        }

    def _token(self, id_: int) -> str:
        return (self._tokenizer.pieces[id_] or b"").decode(errors="replace")

    def _likeliest(self, scored: TokenLogprob) -> dict[str, float]:
        """By text: where ids share a text, as parts of characters do, the likelier one."""
        likeliest: dict[str, float] = {}
        for id_, logprob in scored.top:
            likeliest.setdefault(self._token(id_), logprob)
        return likeliest

    def _advance(self, id_: int) -> int:
        """Step past an id. Returns the offset of its text; if it continues a character, of that character."""
        piece, (begun, _) = self._tokenizer.pieces[id_] or b"", self._decoder.getstate()
        continues = piece[:1] in _CONTINUATIONS
        at = self._offset + bool(begun and not continues)  # an incomplete character is one U+FFFD
        self._offset += len(self._decoder.decode(piece))
        return at
