"""Speculative decoding: several ids per forward pass, and the same ids as without it.

`Speculation.decode` is `engine.decode` with drafts. A verification pass is fed the last id and k draft ids,
and the sampler draws at each of those k + 1 positions, with that position's noise:

    fed      is    85    .    So       "is" is the last id; 85 . So are drafts
    drawn    85    ,    (…)   (…)      85 was right, "." was not: this pass gives 85 and ","

As long as a draw equals its draft, the next draw is valid too. The first draw that differs is still valid;
the rejected drafts are trimmed from the caches. So a pass gives one to k + 1 ids, each sampled from the
model's own logits: a seed gives the same ids as without drafts (in float32; in 16 bit a pass over several
rows rounds differently from a pass over one, and the ids are as likely).

While there is nothing to draft, it dispatches one step ahead, as `engine.decode` does.
"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import mlx.core as mx

from magistral_mlx.wire import Guide

from .cache import KVCache, trim_all
from .drafts import Drafter
from .drawing import Drawing, Step, draw_alike, marked, seen_in
from .logprobs import Scorer
from .model import Transformer
from .pace import MOST, Pace
from .sampling import UNSETTLED, Sampler


class _Pass(NamedTuple):
    """One forward pass, all lazy: a sampling step after each id that it was fed."""

    steps: list[Step]  # k + 1
    drafts: mx.array | None  # (k,), the draft ids that it was fed; None: k is 0


class Speculation:
    """Speculation for one reply: its drafter, the pace that sets draft counts, and a count of passes."""

    def __init__(self, drafter: Drafter, pace: Pace, clock: Callable[[], float] = time.perf_counter) -> None:
        self._drafter = drafter
        self._pace = pace
        self._clock = clock
        self.passes = 0
        """Passes whose draws have been read."""

    def decode(
        self,
        model: Transformer,
        logits: mx.array,
        caches: Sequence[KVCache],
        *,
        sampler: Sampler,
        prompt: Sequence[int] = (),
        limit: int,
        scorer: Scorer | None = None,
    ) -> Generator[int, Guide | None, None]:
        """As `engine.decode`, but without masks, and the caches may hold more than the ids so far.

        At a yield they hold every id so far, except possibly the last; the caller trims what follows.
        """
        drawing, drafter = Drawing(sampler, None, scorer), self._drafter
        passes = _Passes(model, caches, drawing)
        position, left = caches[0].offset, limit  # position: of the first draw of `now`
        now = passes.draw([logits], position, seen_in(sampler, prompt, logits))
        watch, steady, drafted = _Watch(self._clock), False, False
        while left > 0:
            # 1. Nothing to draft: dispatch the next pass before this one's id is read.
            pipelined = now.drafts is None and not self._count(left - 2)
            ahead = passes.feed(now.steps[0], None, position + 1) if pipelined and left > 1 else None
            # 2. Read what this pass drew, up to the first rejected draft.
            first = now.steps[0]
            ids = passes.read(now, position)
            if ahead and now.steps[0] is not first:  # rare: it was settled by sorting, so feed it again
                trim_all(caches, 1)
                ahead = passes.feed(now.steps[0], ids[0], position + 1)
            trim_all(caches, len(now.steps) - len(ids))
            self._note(
                len(now.steps) - 1, watch.lap(), len(ids), steady=steady and pipelined, drafted=drafted
            )
            drafter.extend(ids)
            steady, drafted = pipelined, len(now.steps) > 1
            # 3. Continue from the last of them, with drafts if there are any.
            last = now.steps[len(ids) - 1]
            if not ahead and left > len(ids):
                drafts = drafter.propose(count) if (count := self._count(left - len(ids) - 1)) else None
                ahead = passes.feed(last, ids[-1], position + len(ids), drafts)
            # 4. Emit them, unless the caller forces other ids.
            for at, token in enumerate(ids):
                drawing.note(token, now.steps[at])
                with watch.held():
                    guide = yield token
                assert guide is None or guide.allowed is None
                forced = [*guide.forced] if guide else []
                position += 1
                left -= 1 + len(forced)
                if left <= 0:
                    return
                if forced:
                    drafter.rewind(len(ids) - at - 1)
                    drafter.extend(forced)
                    trim_all(caches, caches[0].offset - position)
                    position += len(forced)
                    ahead = passes.feed_forced(now.steps[at], token, forced, position)
                    steady = drafted = False
                    break
            assert ahead
            now = ahead

    def _count(self, most: int) -> int:
        """How many ids to draft now, at most `most`."""
        return self._pace.best(self._drafter.chance(), min(most, MOST)) if most > 0 else 0

    def _note(self, drafts: int, seconds: float, ids: int, *, steady: bool, drafted: bool) -> None:
        """Record a pass; `drafted`: the previous one had drafts. A pass over forced ids is not timed."""
        self.passes += 1
        if drafts or steady or drafted:
            self._pace.record(drafts, seconds, ids, steady=steady)


class _Passes:
    """Forward passes with a draw after each id. `position` is that of the first draw."""

    def __init__(self, model: Transformer, caches: Sequence[KVCache], drawing: Drawing) -> None:
        self._model = model
        self._caches = caches
        self._drawing = drawing

    def draw(
        self, rows: Iterable[mx.array], position: int, seen: mx.array | None, drafts: mx.array | None = None
    ) -> _Pass:
        """Draw from k + 1 rows of `(V,)`; each draft counts as seen for the draws after it."""
        steps = list[Step]()
        for at, logits in enumerate(rows):
            if at and drafts is not None:
                seen = marked(seen, drafts[at - 1])
            steps.append(self._drawing.draw(logits, position + at, seen))
        mx.async_eval([(step.id, step.scores) for step in steps])
        return _Pass(steps, drafts)

    def feed(self, step: Step, id_: int | None, position: int, drafts: mx.array | None = None) -> _Pass:
        """Feed a step's id (None: not read yet) and the drafts after it."""
        token = step.id if id_ is None else mx.array(id_)
        ids = token if drafts is None else mx.concatenate([token.reshape(1), drafts])
        logits = self._model.logits(self._model(ids.reshape(1, -1), self._caches))  # (1, k + 1, V)
        if drafts is not None and (sampler := self._drawing.plain):
            return self._draw_at_once(sampler, logits[0], position, drafts)
        rows = (logits[0, at] for at in range(logits.shape[1]))
        return self.draw(rows, position, marked(step.seen, token), drafts)

    def _draw_at_once(self, sampler: Sampler, logits: mx.array, position: int, drafts: mx.array) -> _Pass:
        """`draw` for draws that do not depend on one another (no penalty, no scores)."""
        places = [(sampler.seed, position + at) for at in range(logits.shape[0])]
        steps = draw_alike(sampler, logits, places)
        mx.async_eval([step.id for step in steps])
        return _Pass(steps, drafts)

    def feed_forced(self, step: Step, id_: int, ids: Sequence[int], position: int) -> _Pass:
        """Feed forced ids after a step's id, which the caches hold."""
        fed = mx.array([*ids])
        hidden = self._model(fed[None], self._caches, last=True)
        seen = marked(marked(step.seen, mx.array(id_)), fed)
        return self.draw([self._model.logits(hidden)[0, 0]], position, seen)

    def read(self, now: _Pass, position: int) -> list[int]:
        """Wait for the draws, settle unsettled ones → the valid ids, up to the first unlike its draft."""
        # One by one: a stacked array would be computed after the next pass, if that is dispatched already.
        drawn = [cast("int", step.id.item()) for step in now.steps]
        drafts = [] if now.drafts is None else cast("list[int]", now.drafts.tolist())
        for at, step in enumerate(now.steps):
            if drawn[at] == UNSETTLED:
                now.steps[at] = self._drawing.settle(step, position + at)
                drawn[at] = cast("int", now.steps[at].id.item())
            if at == len(drafts) or drawn[at] != drafts[at]:
                return drawn[: at + 1]
        raise AssertionError("unreachable: there is one draw more than drafts")


class _Watch:
    """Seconds from lap to lap, not counting the time that the caller holds a yielded id."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start = clock()

    def lap(self) -> float:
        start, self._start = self._start, self._clock()
        return self._start - start

    @contextmanager
    def held(self) -> Generator[None]:
        since = self._clock()
        yield
        self._start += self._clock() - since
