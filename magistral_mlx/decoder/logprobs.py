"""Log-probabilities of sampled ids, when requested.

Of the model's own distribution: before temperature, penalties, constraints and the nucleus, as OpenAI and
vLLM report them. Does not know text, or how an id was sampled.
"""

from typing import TypeAlias, cast

import mlx.core as mx

from magistral_mlx.checks import whole_number
from magistral_mlx.errors import SamplingError
from magistral_mlx.wire import TokenLogprob

from .sampling import sum_by_parts

MOST = 20
"""Likeliest ids per position; the limit of OpenAI's interface."""

Scores: TypeAlias = tuple[mx.array, mx.array, mx.array]
"""Of one step, lazy: log-probability of the sampled id, the likeliest ids `(k,)`, their log-probabilities."""


class Scorer:
    """Scores each step of one reply. `last` belongs to the id that was emitted last."""

    def __init__(self, top: int) -> None:
        if whole_number("logprobs", top, least=0) > MOST:
            raise SamplingError(f"logprobs is at most {MOST}, found {top}; ask for fewer")
        self._top = top
        self.last: TokenLogprob | None = None

    def of(self, logits: mx.array, token: mx.array) -> Scores:
        """Computed on the device together with the draw, so that reading them needs no further wait."""
        x = logits.astype(mx.float32)
        x = x - mx.max(x)  # first, so that likely ids keep full precision
        whole = mx.log(sum_by_parts(mx.exp(x)))
        if not self._top:
            return x[token] - whole, mx.zeros(0, mx.int32), mx.zeros(0)
        k = min(self._top, x.size)
        likeliest = mx.argpartition(-x, k - 1)[:k]
        return x[token] - whole, likeliest, x[likeliest] - whole

    def note(self, token: int, scores: Scores) -> None:
        """Record the scores of `token`, which is being emitted."""
        logprob, *top = (cast("list[float]", array.tolist()) for array in scores)
        pairs = sorted(zip(*top, strict=True), key=lambda pair: (-pair[1], pair[0]))
        self.last = TokenLogprob(
            id=token, logprob=cast("float", logprob), top=tuple((int(i), p) for i, p in pairs)
        )
