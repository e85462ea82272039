"""When to close the reasoning early: its budget is spent, it repeats itself without end, or the user asks.

It may still finish its line or sentence, within a small grace, so that the answer can build on it. Knows
counts and the state of a transcript; not how the tag is inserted (`transcript`) or fed (`engine`).
"""

from magistral_mlx.checks import whole_number

from .thinking import CLOSE
from .transcript import Transcript

GRACE = 32
"""Tokens that the reasoning may still take to reach the end of a line or sentence."""

TEAR = len(CLOSE) - 1
"""Further tokens, in which a partial closing tag or character may be completed."""


class Closing:
    """Call `due` once per id, and `request` from any thread. budget: tokens of thinking, None for no limit.

    Reasoning that has begun is at most `max(budget, 1) + GRACE + TEAR` tokens long, plus the closing tag.
    """

    def __init__(self, budget: int | None = None) -> None:
        self._budget = None if budget is None else whole_number("think_budget", budget, least=0)
        self._requested = False
        self._waited = 0

    def request(self) -> None:
        """Close at the next end of a line or sentence."""
        self._requested = True

    def due(self, transcript: Transcript, thinking_tokens: int) -> bool:
        """Whether to close now."""
        spent = self._budget is not None and thinking_tokens >= self._budget
        if not (spent or self._requested) or transcript.phase != "thinking":
            return False
        self._waited += 1
        if not transcript.can_close:
            return False
        if transcript.torn:
            return self._waited > GRACE + TEAR
        return transcript.at_pause or not transcript.thinking or self._waited > GRACE
