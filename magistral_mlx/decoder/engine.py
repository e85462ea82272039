"""Prefill a prompt in chunks, then decode one id per forward pass, with the device always one step ahead.

Knows the model, its caches and the sampler. Does not know text, messages, phases or what an id means.

Invariant, at every yield: each cache's offset is the number of ids that the model has been fed.
"""

from collections.abc import Generator, Sequence
from typing import cast

import mlx.core as mx

from magistral_mlx.wire import UNCHANGED, Guide

from .cache import KVCache, trim_all
from .drawing import Drawing, Step, check_finite, marked, seen_in
from .logprobs import Scorer
from .model import Transformer
from .sampling import UNSETTLED, Sampler

PREFILL_CHUNK = 2048
"""Positions per pass: enough to be compute-bound, few enough that activations stay small (128 MiB in 16 bit
for an FFN 32768 wide) and that a stream can be closed between two chunks."""


def prefill(
    model: Transformer, ids: Sequence[int], caches: Sequence[KVCache], *, chunk: int = PREFILL_CHUNK
) -> Generator[int, int | None, mx.array]:
    """Feed `ids` after what the caches hold; yields how many are fed so far, returns the last logits `(V,)`.

    A number sent into the generator becomes the chunk size from then on.
    Before the last chunk only the caches are evaluated, so that the head and the last layer's feed-forward
    are never computed for positions whose logits are not needed.
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
        mx.clear_cache()  # decoding cannot reuse buffers of the size of a chunk's activations
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
    """Yield up to `limit` ids that follow `logits` (of `prefill`); the caller stops it at end of text.

    prompt: all ids so far, for the repetition penalty only.
    allowed: mask of the ids that may come first, and until a guide changes it; None: all.

    At a yield, every id so far has been fed (but not the `limit`-th one), and one more may have been sampled.
    A `Guide` sent into the generator applies after the id just yielded. Its forced ids replace the id sampled
    ahead, count towards `limit` and are not yielded; decoding continues after them. If it changes the mask,
    the next id is sampled again, from the same logits.
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
        # 1. Dispatch the next step before this id is read: the device never waits for Python.
        position += 1
        ahead = feed(step) if left > 1 else None
        token = _read(step.id)
        # 2. Rare: no candidate was inside the nucleus. Sample by sorting, and undo the step ahead.
        if token == UNSETTLED:
            step = drawing.settle(step, position - 1)
            token = _read(step.id)
            if ahead:
                trim_all(caches, 1)
                ahead = feed(step)
        # 3. Emit it; continue from it, or from the ids that the caller forces.
        drawing.note(token, step)
        guide = (yield token) or UNCHANGED
        forced = [*guide.forced]
        left -= 1 + len(forced)
        if ahead is None or left <= 0:
            return
        if guide.allowed is not None:
            drawing.allow(guide.allowed)
        if forced:
            position += len(forced)
            hidden = model(mx.array([forced]), caches, last=True)
            ahead = draw(model.logits(hidden)[0, 0], marked(ahead.seen, mx.array(forced)))
        elif guide.allowed is not None:
            ahead = draw(ahead.logits, ahead.seen)
        step = ahead


def _read(token: mx.array) -> int:
    """Wait for an id."""
    return cast("int", token.item())
