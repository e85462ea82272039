"""Log-probabilities of the ids that are drawn, when somebody asks for them.

Of the model's own distribution: before temperature, penalties, a constraint and the nucleus, as OpenAI and
vLLM report them. Does not know text, or why an id was drawn.
"""

from typing import TypeAlias, cast

import mlx.core as mx

from magistral_mlx.checks import whole_number
from magistral_mlx.errors import SamplingError
from magistral_mlx.wire import TokenLogprob

from .sampling import sum_by_parts

MOST = 20
"""Of the likeliest ids; as many as OpenAI's interface gives."""

Scores: TypeAlias = tuple[mx.array, mx.array, mx.array]
"""Of one step, lazy: the drawn id's, the likeliest ids `(k,)`, and theirs."""


class Scorer:
    """Scores each step of one reply. `last` is of the id that was handed out last."""

    def __init__(self, top: int) -> None:
        if whole_number("logprobs", top, least=0) > MOST:
            raise SamplingError(f"logprobs is at most {MOST}, found {top}; ask for fewer")
        self._top = top
        self.last: TokenLogprob | None = None

    def of(self, logits: mx.array, token: mx.array) -> Scores:
        """Computed on the device beside the draw, so that reading them waits for nothing more."""
        x = logits.astype(mx.float32)
        x = x - mx.max(x)  # first, so that likely ids keep all their digits
        whole = mx.log(sum_by_parts(mx.exp(x)))
        if not self._top:
            return x[token] - whole, mx.zeros(0, mx.int32), mx.zeros(0)
        k = min(self._top, x.size)
        likeliest = mx.argpartition(-x, k - 1)[:k]
        return x[token] - whole, likeliest, x[likeliest] - whole

    def note(self, token: int, scores: Scores) -> None:
        """`token` is handed out."""
        logprob, *top = (cast("list[float]", array.tolist()) for array in scores)
        pairs = sorted(zip(*top, strict=True), key=lambda pair: (-pair[1], pair[0]))
        self.last = TokenLogprob(
            id=token, logprob=cast("float", logprob), top=tuple((int(i), p) for i, p in pairs)
        )
