"""Prefix reuse: KV caches with the ids they hold, so that a prompt's known beginning is not prefilled again.

The prompts of a conversation share their beginning. If earlier reasoning is dropped from the history, they
differ from the first reply on, and trimming restores the state before it. Knows ids and caches; not messages.
"""

from collections.abc import Sequence

import mlx.core as mx

from .cache import KVCache, trim_all


class Prefix:
    """Caches, and the ids fed to them, in order. Used by one stream at a time, on the model's thread."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self.caches = list(caches)
        self.ids: list[int] = []
        self.draft: Prefix | None = None  # the draft model's

    def restart(self) -> None:
        """Forget everything."""
        self.caches = [cache.emptied() for cache in self.caches]
        self.ids = []
        self.draft = None

    def rewind(self, prompt: Sequence[int]) -> int:
        """Trim to the longest common prefix with `prompt`, and take its ids; returns that prefix's length.

        Always shorter than the prompt: its last id is fed again for its logits.
        """
        ids = list(prompt)
        shared = common(self.ids[: self.length], ids[:-1])
        for cache in self.caches:
            cache.trim(cache.offset - shared)
        self.ids = ids
        return shared

    def cut(self, length: int) -> None:
        """Drop all but the first `length` ids, and release their memory."""
        self.ids = self.ids[: min(length, self.length)]
        for cache in self.caches:
            cache.trim(cache.offset - len(self.ids))
            cache.shrink()
        # Until the smaller arrays are evaluated, they hold the old ones.
        mx.eval([array for cache in self.caches for array in cache.arrays()])
        if self.draft:
            self.draft.cut(length)

    def fork(self) -> "Prefix":
        """An independent prefix with the same contents; arrays are shared until one side writes."""
        twin = Prefix([cache.fork() for cache in self.caches])
        twin.ids = list(self.ids)
        twin.draft = self.draft.fork() if self.draft else None
        return twin

    def trim(self) -> None:
        """Drop what was fed beyond `ids`."""
        trim_all(self.caches, max(self.caches[0].offset - len(self.ids), 0))

    @property
    def length(self) -> int:
        """How many of the ids every layer holds; an error in mid-pass leaves the layers unequal."""
        return min(len(self.ids), *(cache.offset for cache in self.caches))

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches) + (self.draft.nbytes if self.draft else 0)


def common(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix, by binary search over slices."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
