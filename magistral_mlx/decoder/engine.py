"""Ids in, ids out: feed a prompt by chunks, then one id per forward pass, the device always one step ahead.

Knows the model, its caches and the sampler. Does not know text, messages, phases or what an id means.

Invariant, at every yield: each cache's offset is the number of ids that the model has been fed.
"""

from collections.abc import Generator, Sequence
from typing import cast

import mlx.core as mx

from magistral_mlx.wire import AS_BEFORE, Guide

from .cache import KVCache, trim_all
from .drawing import Drawing, Step, check_finite, marked, seen_in
from .logprobs import Scorer
from .model import Transformer
from .sampling import UNSETTLED, Sampler

PREFILL_CHUNK = 2048
"""Positions fed at once: enough to be bound by arithmetic, few enough that activations stay small (FFN
32768 wide: 128 MiB in 16 bit) and that a stream can be closed between two chunks."""


def prefill(
    model: Transformer, ids: Sequence[int], caches: Sequence[KVCache], *, chunk: int = PREFILL_CHUNK
) -> Generator[int, int | None, mx.array]:
    """Feed `ids` behind what the caches hold; yields how many are fed so far, returns the last logits `(V,)`.

    A number that is sent in is the size of the chunks from then on.
    Only the cache is evaluated before the last chunk, so that the head and the last layer's feed-forward
    of positions that nobody reads are never computed.
    """
    assert ids
    end = 0
    while True:
        part = mx.array([ids[end : end + chunk]])  # (1, L)
        hidden = model(part, caches, last=True)
        end += part.shape[1]
        if end == len(ids):
            logits = model.logits(hidden)[0, 0]
            mx.eval(logits)
            check_finite(logits)
            return logits
        mx.eval([array for cache in caches for array in cache.arrays()])
        mx.clear_cache()  # a chunk's activations are of no size that decoding could use again
        chunk = (yield end) or chunk


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
        guide = (yield token) or AS_BEFORE
        said = [*guide.forced]
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


def _read(token: mx.array) -> int:
    """Wait for an id."""
    return cast("int", token.item())
