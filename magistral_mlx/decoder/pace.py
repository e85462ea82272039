"""How many ids to draft: as many as bring the most ids a second, by what passes were measured to take.

A pass that checks k drafts takes longer than a plain one, by how much depends on the machine (next to nothing
where weights are read once for a few rows, k times more on some CPUs), on the model and on the context. So it
is measured, in passing. Knows counts, seconds and chances; not ids, nor what a guess is made of.

What is chosen here changes how soon ids are said, never which.
"""

from collections import deque
from collections.abc import Iterator

MOST = 7
"""Drafts checked at once: eight rows, up to which caches and matrices take the way made for few."""
SURE = 3
"""Plain passes to be measured first."""
FORGET = 256
"""Passes after which a measurement is made anew: machines grow hot, and contexts long."""
UNKNOWN = 0.5
"""Of a plain pass: what a draft is taken to cost until it is measured, where it is likely to be right."""
WORTH = 1.1
"""So many times the ids a second, or it is not worth drafting."""
ALLOWED = 4
"""Plain passes whose time drafting may have lost before it pauses. What it loses in trying, or by a wrong
estimate, is bounded by this, whatever the estimates say."""
REPAID = 0.01
"""Of the time that passes: how fast a loss is forgiven, so how much of it may be lost in the long run."""
REST = 16
"""Replies without drafts, where not even sure guesses pay: the plain loop costs less than one that looks."""


class Pace:
    """Running estimates for one model on one machine; shared by its replies, on its thread."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}  # of the last passes with so many drafts
        self._last: dict[int, int] = {}  # the number of the last of them
        self._warm: set[int] = set()
        self._passes = 0
        self._lost = 0.0  # seconds, of those that drafting has cost and not brought in
        self._rested = 0  # replies

    def took(self, drafts: int, seconds: float, ids: int = 1, *, steady: bool = True) -> None:
        """A pass that checked so many drafts took so long and brought so many ids.

        steady: it was asked for while the one before it ran, as all are where nothing is drafted. A pass
            without drafts that was not costs what it costs because of those before it.
        """
        self._passes += 1
        if (drafts or not steady) and 0 in self._seconds:
            self._lost += seconds - ids * self._plain
        self._lost = max(self._lost - REPAID * seconds, 0.0)
        if drafts or steady:
            self._measured(drafts, seconds)

    def pays(self) -> bool:
        """Whether the next reply may draft: unless sure guesses do not pay, and then now and again."""
        if len(self._seconds.get(0, ())) < SURE or self.best(1.0, MOST):
            self._rested = 0
            return True
        self._rested += 1
        if self._rested == REST:  # machines and contexts change: the next one measures anew
            self._seconds.clear()
            self._last.clear()
            self._lost = 0.0
        return False

    def best(self, chance: float, most: int = MOST) -> int:
        """How many to draft, up to `most`, where each is right with this chance if those before it are."""
        if chance <= 0 or most < 1 or len(self._seconds.get(0, ())) < SURE:
            return 0
        plain = self._plain
        if self._lost > ALLOWED * plain:
            return 0
        best, speed, ids = 0, WORTH / plain, 1.0
        for k, cost in enumerate(self._costs(plain, min(most, MOST)), 1):
            ids += chance**k  # the right ones before the first wrong one, and one more
            if ids / cost > speed:
                best, speed = k, ids / cost
        return best

    def _measured(self, drafts: int, seconds: float) -> None:
        if drafts not in self._warm:  # the first of a shape may have compiled kernels
            self._warm.add(drafts)
            return
        # Clocks stand still at times.
        self._seconds.setdefault(drafts, deque(maxlen=5)).append(max(seconds, 1e-9))
        self._last[drafts] = self._passes
        for old in [k for k, last in self._last.items() if self._passes - last > FORGET]:
            del self._seconds[old], self._last[old]

    @property
    def _plain(self) -> float:
        """Seconds of a pass without drafts."""
        return _median(self._seconds[0])

    def _costs(self, plain: float, most: int) -> Iterator[float]:
        """Seconds of a pass with 1, 2, … drafts. What is not measured goes on in proportion, and not far."""
        known = {k: _median(seconds) for k, seconds in self._seconds.items() if k}
        furthest = 2 * max(known, default=1)
        for k in range(1, most + 1):
            if k in known:
                yield known[k]
            elif k > furthest:
                return
            else:
                near = max((n for n in known if n < k), default=min(known, default=0))
                each = max(known[near] - plain, 0) / near if near else UNKNOWN * plain
                yield plain + k * each


def _median(seconds: deque[float]) -> float:
    """Of a few; `statistics.median` takes ten times as long, and this is asked at every token."""
    return sorted(seconds)[len(seconds) // 2]
