"""What text and array modules exchange besides token ids: a guide in, log-probabilities and costs out.

Plain frozen values. Does not know what an id means, nor arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """How a reply continues after the token id that was just sampled.

    forced: ids that come next, instead of sampled ones.
    allowed: mask of the ids that may be sampled from then on (id i: bit i % 8 of byte i // 8); None: the mask
        stays as it is.
    """

    forced: Sequence[int] = ()
    allowed: bytes | None = None


AS_BEFORE = Guide()
"""What None stands for, where nobody has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one token id by the model's own distribution: temperature 1, nothing filtered.

    logprob: natural logarithm, at most 0.
    top: the likeliest ids and theirs, likeliest first; as many as were asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step took: seconds, and peak bytes of memory."""

    seconds: float = 0.0
    peak: int = 0

    def then(self, later: "Cost") -> "Cost":
        """The cost of both steps, one after the other."""
        return Cost(self.seconds + later.seconds, max(self.peak, later.peak))
