"""Token ids → text, incrementally: their bytes, joined to whole characters. Does not know a tokenizer."""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Decodes ids one by one: a character that is split over tokens is returned with its last byte.

    All text returned by `feed` and `flush`, joined, is what mistral_common decodes from all ids at once.
    """

    def __init__(self, pieces: Sequence[bytes | None]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        if not 0 <= token_id < len(self._pieces):
            return self.flush() + "\N{REPLACEMENT CHARACTER}"
        piece = self._pieces[token_id]
        return self.flush() if piece is None else self._utf8.decode(piece)

    @property
    def pending(self) -> bool:
        """Whether a character is incomplete so far."""
        return bool(self._utf8.getstate()[0])

    def flush(self) -> str:
        """An incomplete character becomes U+FFFD. Control tokens flush too: no character spans one."""
        return self._utf8.decode(b"", final=True)
