"""A pool of prefixes of earlier prompts, for later ones to reuse, within a memory limit.

A prompt takes the `Prefix` with which it shares the longest beginning; it is put back after the reply. The
least recently used one is dropped first. Knows ids and bytes; not whose prompts they are.
"""

import threading
from collections.abc import Callable, Sequence

from .prefix import Prefix, common


class Prefixes:
    """`limit`: bytes of the prefixes in the pool; those taken out are not counted.

    `take` and `clear` may be called from any thread, `put` on the model's own only.
    """

    def __init__(self, new: Callable[[], Prefix], limit: int) -> None:
        self.limit = limit
        self._new = new
        self._kept: list[Prefix] = []  # least recently used first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes()

    def take(self, prompt: Sequence[int], *, shared: bool = False) -> Prefix:
        """The best prefix to prefill `prompt` behind: the caller's alone, until it is put back.

        If more than half of it would be lost, it stays here and a fork is returned: it probably belongs to
        another conversation with the same system prompt. shared: always a fork, for several replies to this
        prompt.
        """
        ids = list(prompt)
        with self._lock:
            shared_ids, best = max(
                ((common(p.ids, ids), at) for at, p in enumerate(self._kept)), default=(0, 0)
            )
            if not shared_ids:
                return self._new()
            prefix = self._kept.pop(best)
            if 2 * shared_ids >= prefix.length and not shared:
                return prefix
            self._kept.append(prefix)
            return prefix.fork()

    def put(self, prefix: Prefix, length: int) -> None:
        """Keep the first `length` ids of `prefix`, unless another prefix holds them too."""
        prefix.cut(length)
        ids = prefix.ids
        with self._lock:
            if not ids or any(other.ids[: len(ids)] == ids for other in self._kept):
                return
            self._kept = [other for other in self._kept if ids[: len(other.ids)] != other.ids]
            self._kept.append(prefix)
            while self._nbytes() > self.limit:
                self._kept.pop(0)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._kept.clear()

    def _nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self._kept)
