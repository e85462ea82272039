"""How many ids to draft: as many as bring the most ids a second, by what passes were measured to take.

A pass that checks k drafts takes longer than a plain one, by how much depends on the machine (next to nothing
where weights are read once for a few rows, k times more on some CPUs), on the model and on the context. So it
is measured, in passing. Knows counts, seconds and chances; not ids, nor what a guess is made of.

What is chosen here changes how soon ids are said, never which.
"""

import math
import statistics
from collections import deque

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
REPAID = 0.02
"""Of the time that passes: how fast a loss is forgiven, so how much of it may be lost in the long run."""


class Pace:
    """Running estimates for one model on one machine; shared by its replies, on its thread."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}  # of the last passes with so many drafts
        self._last: dict[int, int] = {}  # the number of the last of them
        self._warm: set[int] = set()
        self._passes = 0
        self._lost = 0.0  # seconds, of those that drafting has cost and not brought in

    def took(self, drafts: int, seconds: float, ids: int = 1) -> None:
        """A pass that checked so many drafts took so long and brought so many ids."""
        self._passes += 1
        if drafts and 0 in self._seconds:
            self._lost += seconds - ids * self._plain
        self._lost = max(self._lost - REPAID * seconds, 0.0)
        if drafts not in self._warm:  # the first of a shape may have compiled kernels
            self._warm.add(drafts)
            return
        self._seconds.setdefault(drafts, deque(maxlen=5)).append(
            max(seconds, 1e-9)
        )  # clocks stand still at times
        self._last[drafts] = self._passes
        for old in [k for k, last in self._last.items() if self._passes - last > FORGET]:
            del self._seconds[old], self._last[old]

    def best(self, chance: float, most: int = MOST) -> int:
        """How many to draft, up to `most`, where each is right with this chance if those before it are."""
        if chance <= 0 or most < 1 or len(self._seconds.get(0, ())) < SURE:
            return 0
        if self._lost > ALLOWED * self._plain:
            return 0
        costs = self._costs(min(most, MOST))
        rates = [_expected(chance, k) / cost for k, cost in enumerate(costs)]
        best = max(range(len(rates)), key=rates.__getitem__)
        return best if rates[best] > WORTH * rates[0] else 0

    @property
    def _plain(self) -> float:
        """Seconds of a pass without drafts."""
        return statistics.median(self._seconds[0])

    def _costs(self, most: int) -> list[float]:
        """Seconds of a pass with 0, 1, … drafts. What is not measured goes on in proportion, and not far."""
        plain = self._plain
        known = {k: statistics.median(seconds) for k, seconds in self._seconds.items() if k}

        def cost(k: int) -> float:
            if k in known or k == 0:
                return known.get(k, plain)
            if k > 2 * max(known, default=1):
                return math.inf
            near = max((n for n in known if n < k), default=min(known, default=0))
            each = max(known[near] - plain, 0) / near if near else UNKNOWN * plain
            return plain + k * each

        return [cost(k) for k in range(most + 1)]


def _expected(chance: float, k: int) -> float:
    """Ids that a pass with `k` drafts brings: the right ones before the first wrong one, and one more."""
    return sum(chance**at for at in range(k + 1))
