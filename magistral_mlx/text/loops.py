"""Detects that the model has begun to repeat itself without end.

Knows token ids and nothing else: no text, no phases, no clock. A loop is a piece of 1 to 400 tokens that is
repeated exactly, or with up to some 5 % of its tokens changed, lost or added each time. How it differs from
legitimate text that is nearly as regular (tables, logs, proofs by cases, songs, matrices):

- **Length**: four copies, and more tokens the fewer distinct ones there are: a long `0 0 0 0` may still be a
  matrix, a sentence of twelve different words may not. Inexact copies have to be longer.
- **Edits of a loop are undone**: a deviation in one copy is gone in the next. What changes again and again in
  the same place (`Case 7`, `Case 8`, `Case 9`) is progress, not a loop.
"""

from math import ceil
from typing import NamedTuple

LONGEST = 400
"""The longest period that is looked for, in tokens."""

_GRAM = 4  # ids that have to recur before a period is examined
_DRIFT = 24  # ids by which insertions may lengthen a period
_COPIES = 2.85  # periods that have to match the one before them: nearly all of four copies
_NEAR_COPIES = 2.85  # the same for inexact copies; a higher value would miss loops and save few false alarms
_KEPT = 6 * (LONGEST + _DRIFT)
_VARIETY = 20_000  # tokens required of a period with one distinct id; with n of them, divided by n²
_EXACT, _NEAR, _MOST = 60, 180, 1500  # tokens required: at least of exact and of inexact copies; at most
_EDITS = 0.13  # share of the tokens; 5 % in each of two copies are 10 % between them
_SHIFTS = sorted(
    ((a, b) for a in range(6) for b in range(6) if a + b), key=lambda s: (max(s), abs(s[0] - s[1]))
)
_CREDIT = 16  # comparisons that a token may cost on average


class _Edit(NamedTuple):
    """`ids[start:end]` replaces `ids[was:until]` of one period before."""

    start: int
    end: int
    was: int
    until: int


class LoopGuard:
    """`feed` every id; it returns True once the last ones are an endless repetition, and then until `reset`.

    Costs a few microseconds an id, and memory for some 15,000 ids, whatever the input.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all ids."""
        self._ids: list[int] = []
        self._forgotten = 0  # number of ids dropped before self._ids
        self._seen: dict[tuple[int, ...], int] = {}  # gram → how many ids there were when it last ended
        self._seen_before: dict[tuple[int, ...], int] = {}
        self._not_before: dict[int, int] = {}  # period → number of ids before which it is not examined again
        self._due: dict[int, set[int]] = {}  # number of ids → periods to examine then, even if no gram recurs
        self._credit = 0
        self._looping = False

    def feed(self, token_id: int) -> bool:
        if self._looping:
            return True
        self._forget()
        self._ids.append(token_id)
        now = self._forgotten + len(self._ids)
        self._credit = min(self._credit + _CREDIT, 4 * _KEPT)
        # 1. Candidate periods: the distance to the last occurrence of this gram, and those that are due.
        periods = self._due.pop(now, set[int]())
        gram = tuple(self._ids[-_GRAM:])
        last = self._seen.get(gram) or self._seen_before.get(gram, now)
        self._seen[gram] = now
        if 0 < now - last <= LONGEST + _DRIFT and now >= self._not_before.get(now - last, 0):
            periods.add(now - last)
        # 2. Examine them while there is credit; a failed attempt says when the next could succeed.
        for period in sorted(periods):
            run, wait = self._examine(period) if self._credit > 0 else (0, 8)
            if not wait:
                self._looping = True
                return True
            self._credit -= run
            self._not_before[period] = now + wait
            if run >= min(period // 2, 50) or not run:
                self._due.setdefault(now + wait, set()).add(period)
        return False

    def _examine(self, period: int) -> tuple[int, int]:
        """(tokens compared, tokens to wait before the next attempt; 0: they are a loop)."""
        ids, size = self._ids, len(self._ids)
        least = max(ceil(_COPIES * period), _EXACT)
        variety = min(len(set(ids[-period:])), len(set(ids[-2 * period : -period])) or period)
        weight = _VARIETY // variety**2
        need = max(least, min(_MOST, weight))
        edits: list[_Edit] = []
        edited = 0
        at, other = size - 1, size - 1 - period
        while (run := size - 1 - at) < need:
            if other >= 0 and ids[at] == ids[other]:
                at, other = at - 1, other - 1
                continue
            need = max(ceil(_NEAR_COPIES * period), min(_MOST, max(_NEAR, 4 * weight)))
            skipped, theirs = _shift(ids, at, other)
            edited += max(skipped, theirs)
            if not skipped + theirs or edited > 3 + _EDITS * run:
                return run, max(least - run, (need - run) // 8 if run > 2 * period else 0, period // 16, 8)
            edits.append(_Edit(at - skipped + 1, at + 1, other - theirs + 1, other + 1))
            at, other = at - skipped, other - theirs
        loop = edited <= _EDITS * need and not _makes_progress(ids, edits, need)
        return need, 0 if loop else max(need // 40, 8)

    def _forget(self) -> None:
        if len(self._ids) < 2 * _KEPT:
            return
        del self._ids[:_KEPT]
        self._forgotten += _KEPT
        self._seen, self._seen_before = {}, self._seen
        now = self._forgotten + len(self._ids)
        self._not_before = {period: when for period, when in self._not_before.items() if when > now}


def _shift(ids: list[int], at: int, other: int) -> tuple[int, int]:
    """The fewest ids to skip back from `at` and from `other` until two in a row match; (0, 0): none found."""
    if other < 8:
        return 0, 0
    for skipped, theirs in _SHIFTS:
        a, b = at - skipped, other - theirs
        if b < a and ids[a] == ids[b] and ids[a - 1] == ids[b - 1]:
            return skipped, theirs
    return 0, 0


def _makes_progress(ids: list[int], edits: list[_Edit], tokens: int) -> bool:
    """Whether places that change keep changing (`Case 7`, `Case 8`), instead of changing back."""
    where = {at: edit for edit in edits for at in range(edit.start, max(edit.end, edit.start + 1))}

    def before(edit: _Edit) -> _Edit | None:
        """The edit, one period before, that produced what this one replaces."""
        return next((where[at] for at in range(edit.was, max(edit.until, edit.was + 1)) if at in where), None)

    undone = progress = restless = 0
    for edit in edits:
        if (first := before(edit)) is None:
            continue
        new = ids[edit.start : edit.end] != ids[first.was : first.until]
        undone, progress = undone + (not new), progress + new
        if (earliest := before(first)) is not None:
            restless += 1
            progress += new and ids[first.start : first.end] != ids[earliest.was : earliest.until]
    return 3 * progress > undone or restless > 1 + 0.01 * tokens
