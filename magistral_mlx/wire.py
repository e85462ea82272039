"""What passes between the two columns beside ids: a guide in, log-probabilities and costs out.

Plain frozen values, known to both. Does not know what an id means, nor arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """How a reply is to go on behind the id that was just drawn.

    said: ids that follow it, in place of what the model would have drawn.
    allowed: the ids that may be drawn from then on, as bits (id i: bit i % 8 of byte i // 8); None: as
        before.
    """

    said: Sequence[int] = ()
    allowed: bytes | None = None


AS_BEFORE = Guide()
"""What None stands for, where nobody has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """How likely the model held one id, by its own distribution: temperature 1, nothing filtered.

    logprob: natural logarithm, at most 0.
    top: the likeliest ids and theirs, likeliest first; as many as were asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step took: seconds, and bytes of memory at their most."""

    seconds: float = 0.0
    peak: int = 0

    def then(self, later: "Cost") -> "Cost":
        """Of both steps, one after the other."""
        return Cost(self.seconds + later.seconds, max(self.peak, later.peak))
