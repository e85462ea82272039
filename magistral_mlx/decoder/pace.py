"""How many ids to draft: the number with the most ids per second, by the measured time of passes.

A pass that verifies k drafts takes longer than a plain one. By how much depends on the machine (next to
nothing where weights are read once for a few rows, k times more on some CPUs), on the model and on the
context, so it is measured during decoding. Knows counts, seconds and acceptance rates; not ids, nor where
drafts come from.

The choice affects when ids come, never which.
"""

from collections import deque
from collections.abc import Iterator

MOST = 7
"""Drafts per pass: with them it has eight rows, up to which caches and matrices use kernels for few rows."""
MIN_PLAIN = 3
"""Plain passes to measure before drafting."""
EXPIRY = 256
"""Passes after which a measurement expires: machines throttle, and contexts grow."""
ASSUMED_COST = 0.5
"""Assumed cost of a draft, in plain passes, while none is measured: only likely drafts are tried."""
MIN_SPEEDUP = 1.1
"""Drafting must promise this many times the plain ids per second."""
MAX_LOSS = 4
"""Time that drafting may lose before it pauses, in plain passes. Bounds the loss from trying, and from wrong
estimates."""
LOSS_DECAY = 0.01
"""Share of the elapsed time by which the loss decays: the share that may be lost in the long run."""
PAUSE = 16
"""Replies without speculation once even certain drafts do not pay: the plain loop has less overhead."""


class Pace:
    """Running estimates for one model on one machine; shared by its replies, on the model's thread."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}  # drafts → seconds of the last such passes
        self._last: dict[int, int] = {}  # drafts → number of the last such pass
        self._warm: set[int] = set()
        self._passes = 0
        self._lost = 0.0  # seconds that drafting cost more than it saved, decaying
        self._paused = 0  # replies without speculation in a row

    def record(self, drafts: int, seconds: float, ids: int = 1, *, steady: bool = True) -> None:
        """Record a pass: the drafts it verified, the seconds it took and the ids it gave.

        steady: it was dispatched while the previous one ran, as in plain decoding. A pass without drafts that
            was not is slower because of drafting, and counts as a loss.
        """
        self._passes += 1
        if (drafts or not steady) and 0 in self._seconds:
            self._lost += seconds - ids * self._plain
        self._lost = max(self._lost - LOSS_DECAY * seconds, 0.0)
        if drafts or steady:
            self._add_measurement(drafts, seconds)

    def pays(self) -> bool:
        """Whether the next reply should speculate. Not if even certain drafts do not pay; but retry."""
        if len(self._seconds.get(0, ())) < MIN_PLAIN or self.best(1.0, MOST):
            self._paused = 0
            return True
        self._paused += 1
        if self._paused == PAUSE:  # machines and contexts change: the next reply measures anew
            self._seconds.clear()
            self._last.clear()
            self._lost = 0.0
        return False

    def best(self, chance: float, most: int = MOST) -> int:
        """How many to draft, up to `most`, if each is right with this probability given those before it."""
        if chance <= 0 or most < 1 or len(self._seconds.get(0, ())) < MIN_PLAIN:
            return 0
        plain = self._plain
        if self._lost > MAX_LOSS * plain:
            return 0
        best, speed, expected = 0, MIN_SPEEDUP / plain, 1.0
        for k, cost in enumerate(self._costs(plain, min(most, MOST)), 1):
            expected += chance**k  # ids: the accepted drafts and one more
            if expected / cost > speed:
                best, speed = k, expected / cost
        return best

    def _add_measurement(self, drafts: int, seconds: float) -> None:
        if drafts not in self._warm:  # the first pass of a shape may compile kernels
            self._warm.add(drafts)
            return
        # A clock may not advance.
        self._seconds.setdefault(drafts, deque(maxlen=5)).append(max(seconds, 1e-9))
        self._last[drafts] = self._passes
        for old in [k for k, last in self._last.items() if self._passes - last > EXPIRY]:
            del self._seconds[old], self._last[old]

    @property
    def _plain(self) -> float:
        """Seconds of a pass without drafts."""
        return _median(self._seconds[0])

    def _costs(self, plain: float, most: int) -> Iterator[float]:
        """Seconds of a pass with 1, 2, … drafts; extrapolated in proportion up to twice the most measured."""
        known = {k: _median(seconds) for k, seconds in self._seconds.items() if k}
        furthest = 2 * max(known, default=1)
        for k in range(1, most + 1):
            if k in known:
                yield known[k]
            elif k > furthest:
                return
            else:
                near = max((n for n in known if n < k), default=min(known, default=0))
                each = max(known[near] - plain, 0) / near if near else ASSUMED_COST * plain
                yield plain + k * each


def _median(seconds: deque[float]) -> float:
    """Upper median. `statistics.median` takes ten times as long, and this runs for every token."""
    return sorted(seconds)[len(seconds) // 2]
