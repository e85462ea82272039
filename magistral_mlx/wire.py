"""What text and array modules exchange besides token ids: guides, log-probabilities and costs.

Plain frozen values. Does not know what an id means, nor arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """How decoding continues after the id that was just sampled.

    forced: ids that come next, in place of sampled ones.
    allowed: mask of the ids that may be sampled from then on (id i: bit i % 8 of byte i // 8); None: the
        current mask stays.
    """

    forced: Sequence[int] = ()
    allowed: bytes | None = None


UNCHANGED = Guide()
"""Nothing forced, the same mask: what None stands for while a reply continues."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one token id under the model's own distribution: temperature 1, nothing filtered.

    logprob: natural logarithm, at most 0.
    top: the likeliest ids with their log-probabilities, likeliest first; as many as were requested.
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
        """The cost of both steps in sequence."""
        return Cost(self.seconds + later.seconds, max(self.peak, later.peak))
