"""Ids in, ids out: feed a prompt by chunks, then one id per forward pass, the device always one step ahead.

Knows the model, its caches and the sampler. Does not know text, messages, phases or what an id means.

Invariant, at every yield: each cache's offset is the number of ids that the model has been fed.
"""

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast

import mlx.core as mx

from .cache import KVCache, trim_all
from .errors import CheckpointError
from .model import Transformer
from .sampling import UNSETTLED, Sampler

PREFILL_CHUNK = 2048
"""Positions fed at once: enough to be bound by arithmetic, few enough that activations stay small (FFN
32768 wide: 128 MiB in 16 bit) and that a stream can be closed between two chunks."""


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


class Step(NamedTuple):
    """The draw of one id: all lazy until `id` is read."""

    logits: mx.array  # (V,)
    seen: mx.array | None  # (V,) bool: ids that a repetition penalty touches
    id: mx.array  # ()


def decode(
    model: Transformer,
    logits: mx.array,
    caches: Sequence[KVCache],
    *,
    sampler: Sampler,
    prompt: Sequence[int] = (),
    limit: int,
) -> Generator[int, Sequence[int] | None, None]:
    """Up to `limit` ids that follow `logits` (of `prefill`); the caller stops it at end of text.

    prompt: all ids so far, for the repetition penalty only. When the caller stops, one id more than those
    yielded may have been prepared, none more fed: an id is fed when the next one is asked for, or before.
    Ids that are sent in (`send`) follow the one just yielded in place of what was prepared, and count towards
    `limit`; what comes next follows them.
    """

    def draw(logits: mx.array, seen: mx.array | None) -> Step:
        step = Step(logits, seen, sampler.draw(logits, position, seen))
        mx.async_eval(step.id)
        return step

    def feed(step: Step) -> Step:
        hidden = model(step.id.reshape(1, 1), caches)
        return draw(model.logits(hidden)[0, 0], mark(step.seen, step.id))

    position = caches[0].offset
    step = draw(logits, seen_mask(sampler, prompt, logits))
    left = limit
    while left > 0:
        # 1. Ask for the next id before this one is known here: the device never waits for Python.
        position += 1
        ahead = feed(step) if left > 1 else None
        token = _read(step.id)
        # 2. Rare: no candidate was inside the nucleus. Draw by sorting; what was fed ahead never happened.
        if token == UNSETTLED:
            check_finite(step.logits)
            step = step._replace(id=sampler.settle(step.logits, position - 1, step.seen))
            token = _read(step.id)
            if ahead:
                trim_all(caches, 1)
                ahead = feed(step)
        # 3. Hand it out; go on from it, or from what the caller would rather have said.
        forced = yield token
        left -= 1 + len(forced or ())
        if ahead is None or left <= 0:
            return
        if forced:
            position += len(forced)
            hidden = model(mx.array([[*forced]]), caches, last=True)
            ahead = draw(model.logits(hidden)[0, 0], mark(ahead.seen, mx.array([*forced])))
        step = ahead


@dataclass(frozen=True, kw_only=True)
class Line:
    """One sequence of a batch: its ids so far, the logits that follow them, and how it goes on."""

    prompt: Sequence[int]
    logits: mx.array  # (V,), of prefill
    sampler: Sampler
    limit: int


Drawn: TypeAlias = dict[int, int]
"""The number of a line → the id it has drawn."""
Told: TypeAlias = Mapping[int, Sequence[int] | None]
"""The number of a line → ids to be said in its place, one a step; or None: it has ended."""


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
        mx.async_eval([step.id for step in ahead])
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
        told = (yield {row.number: id_ for row, id_ in zip(rows, ids, strict=True) if not row.said}) or {}
        stay = [at for at, row in enumerate(rows) if row.goes_on(told.get(row.number, ()))]
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
        self._sampler = line.sampler
        self._position = len(line.prompt)  # of the id of this step
        self._forced = deque[int]()
        seen = seen_mask(line.sampler, line.prompt, line.logits)
        self.step = Step(line.logits, seen, line.sampler.draw(line.logits, self._position, seen))

    def draw_next(self, logits: mx.array) -> Step:
        """The step behind this one, from the logits that follow it."""
        seen = mark(self.step.seen, self.step.id)
        return Step(logits, seen, self._sampler.draw(logits, self._position + 1, seen))

    def settle(self) -> int:
        """The id of this step, where no candidate was inside the nucleus."""
        logits, seen, _ = self.step
        check_finite(logits)
        self.step = self.step._replace(id=self._sampler.settle(logits, self._position, seen))
        return _read(self.step.id)

    def goes_on(self, told: Sequence[int] | None) -> bool:
        """Note what it is to say; false when it has ended, or reached its limit."""
        self._forced += told or ()
        self.left -= 1
        return told is not None and self.left > 0

    def step_to(self, step: Step) -> None:
        self._position += 1
        self.said = bool(self._forced)
        self.step = step._replace(id=mx.array(self._forced.popleft(), mx.int32)) if self.said else step


def _read_all(rows: Sequence[_Row]) -> list[int]:
    """Wait for an id of each."""
    return cast("list[int]", mx.stack([row.step.id for row in rows]).tolist())


def _read(token: mx.array) -> int:
    """Wait for an id."""
    return cast("int", token.item())


def seen_mask(sampler: Sampler, prompt: Sequence[int], logits: mx.array) -> mx.array | None:
    """The ids of the prompt as a mask over the vocabulary, if a penalty will ask for it."""
    if sampler.sampling.repetition_penalty == 1:
        return None
    seen = mx.zeros(logits.shape, mx.bool_)
    if prompt:
        seen[mx.array(list(prompt))] = True
    return seen


def mark(seen: mx.array | None, token: mx.array) -> mx.array | None:
    if seen is None:
        return None
    marked = mx.array(seen)  # a copy by value: the step before keeps its own, in case it is drawn again
    marked[token] = True
    return marked


def check_finite(logits: mx.array) -> None:
    """Weights that hold NaN or Inf, or overflow, show here before they are taken for an answer.

    Asked once per prompt, and of every step that finds no id (NaN is inside no nucleus).
    """
    if not mx.all(mx.isfinite(logits)).item():
        raise CheckpointError(
            "the model's scores are not numbers (NaN or Inf): its weights are damaged, or overflow in this "
            "dtype; convert again, or load with dtype='float32'"
        )
