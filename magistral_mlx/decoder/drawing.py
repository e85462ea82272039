"""One sampling step: the ids allowed, the repetition penalty, the scores.

Knows the sampler. Does not know the model, caches, or the state of a reply.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from magistral_mlx.errors import CheckpointError

from .logprobs import Scorer, Scores
from .sampling import Sampler


class Step(NamedTuple):
    """One sampling step: lazy until `id` is read."""

    logits: mx.array  # (V,)
    seen: mx.array | None  # (V,) bool: ids that a repetition penalty affects
    id: mx.array  # ()
    scores: Scores | None = None


class Drawing:
    """How the ids of one reply are sampled: under which mask, and whether they are scored."""

    def __init__(self, sampler: Sampler, allowed: bytes | None, scorer: Scorer | None) -> None:
        self._sampler = sampler
        self._scorer = scorer
        self._allowed = _mask(allowed)

    def allow(self, allowed: bytes) -> None:
        """From here on, sample only ids in this mask (`Guide.allowed`)."""
        self._allowed = _mask(allowed)

    @property
    def plain(self) -> Sampler | None:
        """The sampler, if a draw needs nothing else: no penalty, no scores, no mask."""
        penalised = self._sampler.sampling.repetition_penalty != 1
        return None if penalised or self._scorer or self._allowed is not None else self._sampler

    def draw(self, logits: mx.array, position: int, seen: mx.array | None) -> Step:
        return self._scored(logits, seen, self._sampler.draw(self._masked(logits), position, seen))

    def settle(self, step: Step, position: int) -> Step:
        """The same draw by sorting, for a step that is `UNSETTLED`."""
        logits, seen = step.logits, step.seen
        check_finite(logits)
        return self._scored(logits, seen, self._sampler.settle(self._masked(logits), position, seen))

    def note(self, token: int, step: Step) -> None:
        """Record the scores of `token`, which is being emitted."""
        if self._scorer and step.scores:
            self._scorer.note(token, step.scores)

    def _scored(self, logits: mx.array, seen: mx.array | None, token: mx.array) -> Step:
        return Step(logits, seen, token, self._scorer.of(logits, token) if self._scorer else None)

    def _masked(self, logits: mx.array) -> mx.array:
        if self._allowed is None:
            return logits
        allowed = self._allowed[: logits.size]
        if allowed.size < logits.size:  # the head is wider than the vocabulary
            allowed = mx.pad(allowed, (0, logits.size - allowed.size))
        return mx.where(allowed, logits, -mx.inf)


def draw_alike(sampler: Sampler, logits: mx.array, places: Sequence[tuple[int, int]]) -> list[Step]:
    """A step for each row of `(n, V)`, by (seed, position); for draws that need only the sampler."""
    ids = sampler.draw_each(logits, places)
    return [Step(logits[at], None, ids[at]) for at in range(len(places))]


def _mask(allowed: bytes | None) -> mx.array | None:
    """Bitmask → one bool per id."""
    if allowed is None:
        return None
    unpacked: Any = np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little").view(np.bool_)
    return mx.array(unpacked)


def seen_in(sampler: Sampler, prompt: Sequence[int], logits: mx.array) -> mx.array | None:
    """The prompt's ids as a mask over the vocabulary; None without a repetition penalty."""
    if sampler.sampling.repetition_penalty == 1:
        return None
    seen = mx.zeros(logits.shape, mx.bool_)
    if prompt:
        seen[mx.array(list(prompt))] = True
    return seen


def marked(seen: mx.array | None, token: mx.array) -> mx.array | None:
    if seen is None:
        return None
    copy = mx.array(seen)  # a copy: the previous step keeps its own, in case it is sampled again
    copy[token] = True
    return copy


def check_finite(logits: mx.array) -> None:
    """Raise if weights contain NaN or Inf, or overflow, rather than sample from garbage.

    Called once per prompt, and for every unsettled step (NaN is inside no nucleus).
    """
    if not mx.all(mx.isfinite(logits)).item():
        raise CheckpointError(
            "the model's scores are not numbers (NaN or Inf): its weights are damaged, or overflow in this "
            "dtype; convert again, or load with dtype='float32'"
        )
