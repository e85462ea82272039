"""Batched decoding: several sequences per pass, each with its own caches, seed and limit.

Rows are independent: each gets the ids it would get alone, and one that is in this pass need not be in the
next. Knows the model and the sampler. Does not know text, or who requested a reply.

Invariant, between a `feed` and the next one: each row's caches hold all ids that it has emitted, except the
one that reaches its limit.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from magistral_mlx.wire import Guide

from .cache import KVCache, side_by_side, trim_all
from .drawing import Drawing, Step, draw_alike, marked, seen_in
from .logprobs import Scorer
from .model import Transformer
from .sampling import UNSETTLED, Sampler, Sampling


@dataclass(frozen=True, kw_only=True)
class Request:
    """One reply to generate."""

    prompt: list[int]
    sampler: Sampler
    limit: int
    allowed: bytes | None = None
    """Mask of the ids that may come first (`Guide.allowed`)."""
    scorer: Scorer | None = None


class Row:
    """One sequence after its prefill: `caches` hold the prompt, and `logits`, `(V,)`, follow it.

    A step is `feed` for all rows, then `read` and `advance` for each row, the rows in any order.
    """

    def __init__(self, request: Request, logits: mx.array, caches: Sequence[KVCache]) -> None:
        self.caches = caches
        self.left = request.limit
        self._drawing = Drawing(request.sampler, request.allowed, request.scorer)
        self._position = len(request.prompt)  # of the current id
        self._is_forced = False  # the current id was not sampled
        self._forced = deque[int]()
        self._ahead: Step | None = None  # follows the current id
        seen = seen_in(request.sampler, request.prompt, logits)
        self._step = _dispatched(self._drawing.draw(logits, self._position, seen))

    @property
    def id(self) -> mx.array:
        """The current id, `()`."""
        return self._step.id

    @property
    def plain(self) -> Sampler | None:
        """The sampler, if the next id can be sampled together with other rows'."""
        return self._drawing.plain

    @property
    def next(self) -> int:
        """The position of the next id."""
        return self._position + 1

    def draw(self, logits: mx.array) -> Step:
        """The step after the current id, from the `(V,)` logits that follow it."""
        return self._drawing.draw(logits, self.next, marked(self._step.seen, self.id))

    def set_ahead(self, ahead: Step) -> None:
        self._ahead = ahead

    def read(self, model: Transformer) -> int | None:
        """Wait for the current id; None if it was forced. What this raises concerns this row only."""
        if self._is_forced:
            return None
        token = cast("int", self.id.item())
        if token == UNSETTLED:  # rare: sample by sorting, and undo the step ahead
            self._step = self._drawing.settle(self._step, self._position)
            token = cast("int", self.id.item())
            if self._ahead:
                trim_all(self.caches, 1)
                feed(model, [self])
        self._drawing.note(token, self._step)
        return token

    def advance(self, guide: Guide | None) -> bool:
        """Advance past the current id; false if the row has ended (`guide` is None) or reached its limit."""
        self.left -= 1
        if guide is None or self._ahead is None:
            return False
        if guide.allowed is not None:
            self._drawing.allow(guide.allowed)
        self._forced += guide.forced
        self._position += 1
        step, self._ahead = self._ahead, None
        self._is_forced = bool(self._forced)
        if self._is_forced:
            step = step._replace(id=mx.array(self._forced.popleft(), mx.int32))
        elif guide.allowed is not None:  # the mask has changed since it was sampled
            step = _dispatched(self._drawing.draw(step.logits, self._position, step.seen))
        self._step = step
        return True


def feed(model: Transformer, rows: Sequence[Row]) -> None:
    """Dispatch one pass over the current id of every row, and sample what follows. Last ids are not fed.

    Does not wait: the current ids, which `read` waits for next, were dispatched a step earlier, so the device
    computes this pass in the meantime.
    """
    rows = [row for row in rows if row.left > 1]
    if not rows:
        return
    ids = mx.stack([row.id for row in rows])[:, None]  # (B, 1)
    hidden = model(ids, side_by_side([row.caches for row in rows]))
    steps = _draw(rows, model.logits(hidden)[:, 0])
    mx.async_eval([(step.id, step.scores) for step in steps])
    for row, step in zip(rows, steps, strict=True):
        row.set_ahead(step)


def _draw(rows: Sequence[Row], logits: mx.array) -> list[Step]:
    """The next step of each row from `(B, V)`: rows with equal `Sampling` at once, the others one by one."""
    groups: dict[Sampling, dict[int, Sampler]] = {}
    for at, row in enumerate(rows):
        if sampler := row.plain:
            groups.setdefault(sampler.sampling, {})[at] = sampler
    steps: dict[int, Step] = {}
    for group in groups.values():
        first, *_ = group.values()
        selected = logits if len(group) == len(rows) else logits[mx.array([*group])]
        places = [(sampler.seed, rows[at].next) for at, sampler in group.items()]
        steps |= zip(group, draw_alike(first, selected, places), strict=True)
    return [steps.get(at) or row.draw(logits[at]) for at, row in enumerate(rows)]


def _dispatched(step: Step) -> Step:
    """Evaluate separately from the next pass: an array is available only with all dispatched together."""
    mx.async_eval(step.id, step.scores)
    return step
