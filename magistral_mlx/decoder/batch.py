"""Several sequences a pass: each has its caches, its seed and its limit, and goes on as if it were alone.

Nothing ties one to another but that they are fed together: one that is in this pass need not be in the next.
Knows the model and the sampler. Does not know text, or who asks.

Invariant, between a `feed` and the next one: each row's caches hold all ids that it has handed out.
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
    """One reply to be made."""

    prompt: list[int]
    sampler: Sampler
    limit: int
    allowed: bytes | None = None
    """The ids that it may begin with (`Guide.allowed`)."""
    scorer: Scorer | None = None


class Row:
    """A sequence behind its prompt, which `caches` hold and `logits`, `(V,)`, follow.

    A step is three calls: `feed` for all, then `take` and `go_on` for each, in any order.
    """

    def __init__(self, request: Request, logits: mx.array, caches: Sequence[KVCache]) -> None:
        self.caches = caches
        self.left = request.limit
        self._drawing = Drawing(request.sampler, request.allowed, request.scorer)
        self._position = len(request.prompt)  # of the id in hand
        self._said = False  # the id in hand was not drawn
        self._forced = deque[int]()
        self._ahead: Step | None = None  # behind the id in hand
        seen = seen_in(request.sampler, request.prompt, logits)
        self._step = _begun(self._drawing.draw(logits, self._position, seen))

    @property
    def id(self) -> mx.array:
        """The id in hand, `()`."""
        return self._step.id

    @property
    def plain(self) -> Sampler | None:
        """What draws the next id, if it can be drawn together with others'."""
        return self._drawing.plain

    @property
    def next(self) -> int:
        """The position of the next id."""
        return self._position + 1

    def draw(self, logits: mx.array) -> Step:
        """The step behind the id in hand, from the `(V,)` logits that follow it."""
        return self._drawing.draw(logits, self.next, marked(self._step.seen, self.id))

    def fed(self, ahead: Step) -> None:
        self._ahead = ahead

    def take(self, model: Transformer) -> int | None:
        """Wait for the id in hand; None: it is said in the model's place. Errors are of this row alone."""
        if self._said:
            return None
        token = cast("int", self.id.item())
        if token == UNSETTLED:  # rare: draw by sorting; what was fed ahead never happened
            self._step = self._drawing.settle(self._step, self._position)
            token = cast("int", self.id.item())
            if self._ahead:
                trim_all(self.caches, 1)
                feed(model, [self])
        self._drawing.note(token, self._step)
        return token

    def go_on(self, guide: Guide | None) -> bool:
        """Behind the id in hand; false when the row has ended, or reached its limit."""
        self.left -= 1
        if guide is None or self._ahead is None:
            return False
        if guide.allowed is not None:
            self._drawing.allow(guide.allowed)
        self._forced += guide.forced
        self._position += 1
        step, self._ahead = self._ahead, None
        self._said = bool(self._forced)
        if self._said:
            step = step._replace(id=mx.array(self._forced.popleft(), mx.int32))
        elif guide.allowed is not None:  # other ids than when it was drawn
            step = _begun(self._drawing.draw(step.logits, self._position, step.seen))
        self._step = step
        return True


def feed(model: Transformer, rows: Sequence[Row]) -> None:
    """Ask for what follows the id that each has in hand, in one pass. Nobody waits; last ids are not fed.

    What `take` reads was asked for before, so that the device has this pass to go on with meanwhile.
    """
    rows = [row for row in rows if row.left > 1]
    if not rows:
        return
    ids = mx.stack([row.id for row in rows])[:, None]  # (B, 1)
    hidden = model(ids, side_by_side([row.caches for row in rows]))
    steps = _draw(rows, model.logits(hidden)[:, 0])
    mx.async_eval([(step.id, step.scores) for step in steps])
    for row, step in zip(rows, steps, strict=True):
        row.fed(step)


def _draw(rows: Sequence[Row], logits: mx.array) -> list[Step]:
    """The next step of each from `(B, V)`: those that sample alike at once, the others one by one."""
    alike: dict[Sampling, dict[int, Sampler]] = {}
    for at, row in enumerate(rows):
        if sampler := row.plain:
            alike.setdefault(sampler.sampling, {})[at] = sampler
    steps: dict[int, Step] = {}
    for group in alike.values():
        first, *_ = group.values()
        theirs = logits if len(group) == len(rows) else logits[mx.array([*group])]
        places = [(sampler.seed, rows[at].next) for at, sampler in group.items()]
        steps |= zip(group, draw_alike(first, theirs, places), strict=True)
    return [steps.get(at) or row.draw(logits[at]) for at, row in enumerate(rows)]


def _begun(step: Step) -> Step:
    """Not left to the next pass: an array is there when all that was asked for with it is."""
    mx.async_eval(step.id, step.scores)
    return step
