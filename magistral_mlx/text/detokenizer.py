"""Ids → text that can be shown: the bytes of each, joined to whole characters. Does not know a tokenizer."""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Ids → text as it becomes visible: a character split over tokens comes whole, with its last byte.

    What is fed and flushed joins to what mistral_common decodes from the ids as a whole.
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
        """Whether a character has begun and not ended."""
        return bool(self._utf8.getstate()[0])

    def flush(self) -> str:
        """A character that never came whole is U+FFFD. Control tokens flush too: none spans one."""
        return self._utf8.decode(b"", final=True)
