"""Ids in, ids out: feed a prompt by chunks, then one id per forward pass, the device always one step ahead.

Knows the model, its caches and the sampler. Does not know text, messages, phases or what an id means.

Invariant, at every yield: each cache's offset is the number of ids that the model has been fed.
"""

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import mlx.core as mx

from magistral_mlx.wire import Guide

from .cache import KVCache, trim_all
from .drawing import Drawing, Step, check_finite, marked, seen_in
from .logprobs import Scorer
from .model import Transformer
from .sampling import UNSETTLED, Sampler

PREFILL_CHUNK = 2048
"""Positions fed at once: enough to be bound by arithmetic, few enough that activations stay small (FFN
32768 wide: 128 MiB in 16 bit) and that a stream can be closed between two chunks."""

_AS_BEFORE = Guide()


def prefill(
    model: Transformer, ids: Sequence[int], caches: Sequence[KVCache], *, chunk: int = PREFILL_CHUNK
) -> Generator[int, None, mx.array]:
    """Feed `ids` behind what the caches hold; yields how many are fed so far, returns the last logits `(V,)`.

    Only the cache is evaluated before the last chunk, so that the head and the last layer's feed-forward
    of positions that nobody reads are never computed.
    """
    assert ids
    for start in range(0, len(ids), chunk):
        part = mx.array([ids[start : start + chunk]])  # (1, L)
        hidden = model(part, caches, last=True)
        end = start + part.shape[1]
        if end == len(ids):
            logits = model.logits(hidden)[0, 0]
            mx.eval(logits)
            check_finite(logits)
            return logits
        mx.eval([array for cache in caches for array in cache.arrays()])
        mx.clear_cache()  # a chunk's activations are of no size that decoding could use again
        yield end
    raise AssertionError("unreachable: the last chunk returns")


def decode(
    model: Transformer,
    logits: mx.array,
    caches: Sequence[KVCache],
    *,
    sampler: Sampler,
    prompt: Sequence[int] = (),
    limit: int,
    allowed: bytes | None = None,
    scorer: Scorer | None = None,
) -> Generator[int, Guide | None, None]:
    """Up to `limit` ids that follow `logits` (of `prefill`); the caller stops it at end of text.

    prompt: all ids so far, for the repetition penalty only. When the caller stops, one id more than those
    yielded may have been prepared, none more fed: an id is fed when the next one is asked for, or before.
    A guide that is sent in (`send`) says how it goes on behind the id just yielded. Its ids are said in place
    of what was prepared, and count towards `limit`; what comes next follows them. Where it allows other ids
    than before (to begin with `allowed`; None: all), the pass that was prepared is drawn from again.
    """

    def draw(logits: mx.array, seen: mx.array | None) -> Step:
        step = drawing.draw(logits, position, seen)
        mx.async_eval(step.id, step.scores)
        return step

    def feed(step: Step) -> Step:
        hidden = model(step.id.reshape(1, 1), caches)
        return draw(model.logits(hidden)[0, 0], marked(step.seen, step.id))

    drawing = Drawing(sampler, allowed, scorer)
    position = caches[0].offset
    step = draw(logits, seen_in(sampler, prompt, logits))
    left = limit
    while left > 0:
        # 1. Ask for the next id before this one is known here: the device never waits for Python.
        position += 1
        ahead = feed(step) if left > 1 else None
        token = _read(step.id)
        # 2. Rare: no candidate was inside the nucleus. Draw by sorting; what was fed ahead never happened.
        if token == UNSETTLED:
            step = drawing.settle(step, position - 1)
            token = _read(step.id)
            if ahead:
                trim_all(caches, 1)
                ahead = feed(step)
        # 3. Hand it out; go on from it, or from what the caller would rather have said.
        drawing.note(token, step)
        guide = (yield token) or _AS_BEFORE
        said = [*guide.said]
        left -= 1 + len(said)
        if ahead is None or left <= 0:
            return
        if guide.allowed is not None:
            drawing.allow(guide.allowed)
        if said:
            position += len(said)
            hidden = model(mx.array([said]), caches, last=True)
            ahead = draw(model.logits(hidden)[0, 0], marked(ahead.seen, mx.array(said)))
        elif guide.allowed is not None:
            ahead = draw(ahead.logits, ahead.seen)
        step = ahead


@dataclass(frozen=True, kw_only=True)
class Line:
    """One sequence of a batch: its ids so far, the logits that follow them, and how it goes on."""

    prompt: Sequence[int]
    logits: mx.array  # (V,), of prefill
    sampler: Sampler
    limit: int
    allowed: bytes | None = None
    scorer: Scorer | None = None


Drawn: TypeAlias = dict[int, int]
"""The number of a line → the id it has drawn."""
Told: TypeAlias = Mapping[int, Guide | None]
"""The number of a line → how it goes on, ids that are said one a step; or None: it has ended."""


def decode_batch(
    model: Transformer, lines: Sequence[Line], caches: Sequence[KVCache]
) -> Generator[Drawn, Told | None, None]:
    """`decode` for several sequences, a step of all at a time; `caches` hold their prompts (`cache.stacked`).

    Yields what each has drawn; one in whose place ids are being said has drawn nothing. A line leaves at its
    limit, or when it is told that it has ended; the others go on without it, in a smaller batch.
    """

    def feed() -> list[Step]:
        hidden = model(mx.stack([row.step.id for row in rows]).reshape(-1, 1), caches)
        logits = model.logits(hidden)[:, 0]  # (B, V)
        ahead = [row.draw_next(logits[at]) for at, row in enumerate(rows)]
        mx.async_eval([(step.id, step.scores) for step in ahead])
        return ahead

    rows: list[_Row] = [_Row(number, line) for number, line in enumerate(lines)]
    while rows:
        # 1. Ask for the next ids before these are known here.
        ahead = feed() if any(row.left > 1 for row in rows) else []
        ids = _read_all(rows)
        # 2. Rare: one found no candidate inside its nucleus. It draws by sorting, and all are fed again.
        if UNSETTLED in ids:
            for at, row in enumerate(rows):
                if ids[at] == UNSETTLED:
                    ids[at] = row.settle()
            if ahead:
                trim_all(caches, 1)
                ahead = feed()
        # 3. Hand them out; some have ended then, some are told what to say.
        drawn = {row.number: row.hand_out(id_) for row, id_ in zip(rows, ids, strict=True) if not row.said}
        told = (yield drawn) or {}
        stay = [at for at, row in enumerate(rows) if row.goes_on(told.get(row.number, _AS_BEFORE))]
        # 4. The others go on, from what they drew or from what they are to say.
        if ahead and 0 < len(stay) < len(rows):
            for cache in caches:
                cache.select(stay)
        for at in stay:
            rows[at].step_to(ahead[at])
        rows = [rows[at] for at in stay]


class _Row:
    """A line that still goes on."""

    def __init__(self, number: int, line: Line) -> None:
        self.number = number
        self.left = line.limit
        self.said = False  # the id of this step was not drawn
        self._drawing = Drawing(line.sampler, line.allowed, line.scorer)
        self._position = len(line.prompt)  # of the id of this step
        self._forced = deque[int]()
        self._again = False  # other ids are allowed than when the next was drawn
        seen = seen_in(line.sampler, line.prompt, line.logits)
        self.step = self._drawing.draw(line.logits, self._position, seen)

    def draw_next(self, logits: mx.array) -> Step:
        """The step behind this one, from the logits that follow it."""
        return self._drawing.draw(logits, self._position + 1, marked(self.step.seen, self.step.id))

    def settle(self) -> int:
        """The id of this step, where no candidate was inside the nucleus."""
        self.step = self._drawing.settle(self.step, self._position)
        return _read(self.step.id)

    def hand_out(self, token: int) -> int:
        self._drawing.note(token, self.step)
        return token

    def goes_on(self, guide: Guide | None) -> bool:
        """Note how; false when it has ended, or reached its limit."""
        self.left -= 1
        if guide is None:
            return False
        self._forced += guide.said
        self._again = guide.allowed is not None
        if guide.allowed is not None:
            self._drawing.allow(guide.allowed)
        return self.left > 0

    def step_to(self, step: Step) -> None:
        self._position += 1
        self.said = bool(self._forced)
        if self.said:
            step = step._replace(id=mx.array(self._forced.popleft(), mx.int32))
        elif self._again:
            step = self._drawing.draw(step.logits, self._position, step.seen)
        self.step = step


def _read_all(rows: Sequence[_Row]) -> list[int]:
    """Wait for an id of each."""
    return cast("list[int]", mx.stack([row.step.id for row in rows]).tolist())


def _read(token: mx.array) -> int:
    """Wait for an id."""
    return cast("int", token.item())
