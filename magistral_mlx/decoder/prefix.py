"""What a KV cache has read, by id: the part of the next prompt that need not be read again.

A conversation's prompts begin alike. Where earlier reasoning is dropped from history they part at the first
reply, and the state at the end of that prompt is had back by trimming. Knows ids and caches; not messages.
"""

from collections.abc import Sequence

import mlx.core as mx

from .cache import KVCache, trim_all


class Prefix:
    """Caches, and the ids they were fed, in order. Used by one stream at a time, on the model's thread."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self.caches = list(caches)
        self.ids: list[int] = []
        self.draft: Prefix | None = None  # of another model, which guesses for this one

    def restart(self) -> None:
        """Forget everything."""
        self.caches = [cache.emptied() for cache in self.caches]
        self.ids = []
        self.draft = None

    def rewind(self, prompt: Sequence[int]) -> int:
        """Go back to the longest common beginning with `prompt`; returns its length.

        Always shorter than the prompt: its last id is fed anew, since its logits are what comes next.
        """
        ids = list(prompt)
        shared = common(self.ids[: self.length], ids[:-1])
        for cache in self.caches:
            cache.trim(cache.offset - shared)
        self.ids = ids
        return shared

    def cut(self, length: int) -> None:
        """Forget all but the first `length` ids, and give back the room that they took."""
        self.ids = self.ids[: min(length, self.length)]
        for cache in self.caches:
            cache.trim(cache.offset - len(self.ids))
            cache.shrink()
        mx.eval([array for cache in self.caches for array in cache.arrays()])  # or the old room is still held
        if self.draft:
            self.draft.cut(length)

    def fork(self) -> "Prefix":
        """The same past, independent from here on; the arrays are shared until one side writes."""
        twin = Prefix([cache.fork() for cache in self.caches])
        twin.ids = list(self.ids)
        twin.draft = self.draft.fork() if self.draft else None
        return twin

    def trim(self) -> None:
        """Forget what was fed beyond `ids`."""
        trim_all(self.caches, max(self.caches[0].offset - len(self.ids), 0))

    @property
    def length(self) -> int:
        """How many of the ids every layer has read: an error in mid-pass leaves layers apart."""
        return min(len(self.ids), *(cache.offset for cache in self.caches))

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches) + (self.draft.nbytes if self.draft else 0)


def common(one: list[int], other: list[int]) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
