"""Applies a grammar to the answer only: the reasoning before it stays free.

Follows the ids of a reply by the same rules as `thinking.ThinkParser` follows their text, and gives the mask
of allowed ids before each draw. Does not know why a reply ends, or how ids are sampled.

Three cases would let text into the answer that the grammar has not checked, or leave no answer at all:

- A reply that skips the reasoning: its first ids may open the tag or begin the answer. Both are followed
  until it is clear which.
- An id that ends the reasoning and begins the answer (`>The`): allowed only if the grammar accepts what
  follows the tag.
- End of text, or another control token that would end the reasoning: not allowed, unless the grammar begins
  with it, as for a tool call.
"""

import codecs
from functools import cached_property
from typing import Literal

from magistral_mlx.text.thinking import CLOSE, OPEN, unfinished

from .grammar import Grammar, Matcher, Vocabulary, bits

_OPEN, _CLOSE = OPEN.encode(), CLOSE.encode()


class Constraint:
    """Call `mask` before each draw, and `accept` with every sampled id except the end of text.

    think: whether the reply may begin with reasoning. False: its first id belongs to the answer.
    """

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, *, think: bool = True) -> None:
        self._matcher = Matcher(grammar, vocabulary)
        self._vocabulary = vocabulary
        self._think_ids = vocabulary.tokenizer.think_ids
        self._think = think
        self._state: Literal["start", "thinking", "answer"] = "start"
        self._bytes = b""  # at the start all bytes so far, while thinking what may be half a tag
        self._may_be_answer = True  # whether the bytes at the start could begin an answer
        self._free = vocabulary.text | bits(self._think_ids or ())
        self._last: int | None = None

    def mask(self) -> bytes | None:
        """The ids that may come next (`wire.Guide.allowed`); None: the same as in the last call."""
        allowed = self._allowed()
        if allowed == self._last:
            return None
        self._last = allowed
        return self._vocabulary.to_bytes(allowed)

    def accept(self, token: int) -> None:
        """Record a sampled id, which the mask allowed."""
        if self._state == "answer":
            accepted = self._matcher.accept(token)
            assert accepted
        elif self._state == "thinking":
            self._continue_thinking(token)
        else:
            self._start(token)

    def close_thinking(self) -> None:
        """A closing tag was forced: the answer comes next."""
        self._state = "answer"

    @property
    def done(self) -> bool:
        """Whether the answer is complete, and nothing can follow it."""
        return self._state == "answer" and self._matcher.done

    def _allowed(self) -> int:
        if self._state == "answer":
            return self._matcher.mask()
        if self._state == "thinking":
            return (self._free | self._calls) & ~bits(self._bad_ends())
        allowed = self._matcher.mask() if self._may_be_answer else 0
        return allowed | self._opening_mask() if self._think else allowed

    # ---------------------------------------------------------------- the start

    def _opening_mask(self) -> int:
        """The ids with which the text so far may still become the opening tag."""
        begun = self._bytes.lstrip()
        if not self._think_ids:
            return self._vocabulary.opening(begun) if _OPEN.startswith(begun) else 0
        return 0 if begun else self._vocabulary.space | bits([self._think_ids[0]])

    def _start(self, token: int) -> None:
        if self._think_ids and token == self._think_ids[0]:
            self._enter_thinking(b"")
            return
        self._may_be_answer = self._may_be_answer and self._matcher.accept(token)
        if self._may_be_answer and self._vocabulary.pieces[token] is None:  # a tool call begins
            self._state = "answer"
            return
        self._bytes += self._vocabulary.pieces[token] or b""
        body = codecs.getincrementaldecoder("utf-8")("replace").decode(self._bytes).lstrip()
        if not self._think_ids and body.startswith(OPEN):
            self._enter_thinking(self._bytes.partition(_OPEN)[2])
        elif body and (self._think_ids or not OPEN.startswith(body)):
            assert self._may_be_answer
            self._state = "answer"

    def _enter_thinking(self, begun: bytes) -> None:
        self._state, self._bytes = "thinking", begun
        self._matcher.reset()

    # ---------------------------------------------------------------- while it thinks

    @cached_property
    def _calls(self) -> int:
        """The control tokens that the grammar may begin with; evaluated before it has consumed anything."""
        return self._matcher.mask() & ~self._vocabulary.text & ~bits([self._vocabulary.eos_id])

    def _bad_ends(self) -> list[int]:
        """The ids that would end the reasoning and continue with bytes that cannot begin the answer."""
        if self._think_ids:
            return []
        half = unfinished(self._bytes.decode("latin-1"), CLOSE)
        return [i for i, tail in self._vocabulary.closing(half) if not self._matcher.would_accept(tail)]

    def _continue_thinking(self, token: int) -> None:
        ends = self._think_ids is not None and token == self._think_ids[1]
        if self._vocabulary.pieces[token] is None and (ends or self._matcher.accept(token)):
            self._state = "answer"  # by a tag, or by a tool call
        if self._think_ids:
            return
        self._bytes += self._vocabulary.pieces[token] or b""
        _, tag, answer = self._bytes.partition(_CLOSE)
        if tag:
            self._state = "answer"
            self._matcher.accept_bytes(answer)
        self._bytes = self._bytes[1 - len(_CLOSE) :]
