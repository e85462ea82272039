"""Who guesses the next ids, so that one forward pass can check several: a look-up, or a smaller model.

A guess may be anything: what is not what the model itself draws is thrown away (`speculation`). Knows ids,
how often its guesses were right lately, and, of a draft model, its caches. Does not know what a guess costs.
"""

from collections.abc import Sequence
from itertools import takewhile
from operator import eq
from typing import Protocol, cast

import mlx.core as mx

from .cache import trim_all
from .drawing import marked, seen_in
from .model import Transformer
from .prefix import Prefix
from .sampling import Sampler

SIZES = (8, 5, 3)
"""What is looked up are the last 8 ids, then the last 5, then the last 3: the longer, the surer. Fewer than
3 recur by chance too often."""
LATELY = 0.95
"""What an outcome counts for when the next one is known: the last 20 or so decide."""
BEHIND = 64
"""Ids that a draft model may have missed while it did not pay; behind more it is let go for this reply, since
reading them costs as well."""


class Rate:
    """How often guesses came true, lately. Begins as if it had seen two, of which so many were right."""

    def __init__(self, start: float = 1.0) -> None:
        self._start = start
        self._right = self._all = 0.0

    def saw(self, *, right: bool) -> None:
        self._right = LATELY * self._right + right
        self._all = LATELY * self._all + 1

    @property
    def value(self) -> float:
        return (self._right + self._start) / (self._all + 2)


class Drafter(Protocol):
    """Is told every id of a reply, in order, and guesses those that follow."""

    def extend(self, ids: Sequence[int]) -> None:
        """These were said."""
        ...

    def rewind(self, n: int) -> None:
        """The last `n` were not said after all."""
        ...

    def chance(self) -> float:
        """How likely each id of the next guess is to be right; 0: there is no guess."""
        ...

    def propose(self, most: int) -> mx.array | None:
        """Up to `most` ids, `(k,)`, lazy; None: no guess."""
        ...


class PromptLookup:
    """Guesses that what followed the last few ids before, in the prompt or the reply, follows them again.

    An index from every run of 3, 5 and 8 ids to what came after it last: an id more costs three entries.
    Guesses are judged whether or not they are checked by a pass, so their rates are known for nothing.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # a run of ids → the place behind it
        self._rates = {size: Rate() for size in SIZES}
        for id_ in prompt:
            self._add(id_)
        self._found = self._find()

    def extend(self, ids: Sequence[int]) -> None:
        for id_ in ids:
            if self._found:
                size, place = self._found
                self._rates[size].saw(right=self._ids[place] == id_)
            self._add(id_)
            self._found = self._find()

    def rewind(self, n: int) -> None:
        """Entries of what was never said may stay: a guess need not be right."""
        if n:
            del self._ids[-n:]
            self._found = self._find()

    def chance(self) -> float:
        return self._rates[self._found[0]].value if self._found else 0.0

    def propose(self, most: int) -> mx.array | None:
        """What came next then. Where that runs into the end, it goes round: what repeats, repeats again."""
        if not self._found:
            return None
        _, place = self._found
        period = len(self._ids) - place
        return mx.array([self._ids[place + at % period] for at in range(most)])

    def _add(self, id_: int) -> None:
        ids = self._ids
        for size in SIZES:
            if len(ids) >= size:
                self._after[(*ids[-size:],)] = len(ids)
        ids.append(id_)

    def _find(self) -> tuple[int, int] | None:
        """The longest run at the end that was there before: its length, and the place behind it."""
        ids = self._ids
        for size in SIZES:
            place = self._after.get((*ids[-size:],), len(ids))
            if size <= len(ids) and place < len(ids):
                return size, place
        return None


class DraftModel:
    """Guesses what a smaller model with the same vocabulary would say, drawn with the same noise.

    prefix: its caches, and the ids that they have read; the reply's are added to them.
    """

    def __init__(self, model: Transformer, prefix: Prefix, sampler: Sampler) -> None:
        self._model = model
        self._prefix = prefix
        self._sampler = sampler
        self._rate = Rate(1.6)  # somebody chose it for this; nothing but trying tells
        self._guess: mx.array | None = None  # not judged yet; the caches hold it, but for its last id
        self._seen: mx.array | None = None

    def extend(self, ids: Sequence[int]) -> None:
        self._judge(ids)
        self._prefix.ids += ids
        if self._seen is not None and ids:
            self._seen = marked(self._seen, mx.array([*ids]))

    def rewind(self, n: int) -> None:
        self._guess = None
        if n:
            del self._prefix.ids[-n:]
        self._prefix.trim()

    def chance(self) -> float:
        return self._rate.value if self._unread <= BEHIND else 0.0

    def propose(self, most: int) -> mx.array | None:
        prefix, position = self._prefix, len(self._prefix.ids)
        unread = mx.array([prefix.ids[-self._unread :]])
        guess = list[mx.array]()
        seen: mx.array | None = None
        for at in range(most):
            hidden = self._model(unread, prefix.caches, last=True)
            logits = self._model.logits(hidden)[0, 0]
            seen = self._mask(logits) if at == 0 else marked(seen, guess[-1])
            # Where no candidate was inside the nucleus there is no guess: any id will do.
            guess.append(mx.maximum(self._sampler.draw(logits, position + at, seen), 0))
            unread = guess[-1].reshape(1, 1)
        self._guess = mx.stack(guess)
        return self._guess

    @property
    def _unread(self) -> int:
        return len(self._prefix.ids) - self._prefix.caches[0].offset

    def _mask(self, logits: mx.array) -> mx.array | None:
        """What a repetition penalty touches: made once, then kept up by `extend`."""
        if self._seen is None:
            self._seen = seen_in(self._sampler, self._prefix.ids, logits)
        return self._seen

    def _judge(self, ids: Sequence[int]) -> None:
        """Compare the guess with what was said, and forget what of it was not."""
        if self._guess is None:
            return
        guess, self._guess = cast("list[int]", self._guess.tolist()), None
        right = sum(takewhile(bool, map(eq, guess, ids)))
        for _ in range(right):
            self._rate.saw(right=True)
        if right < len(guess):
            self._rate.saw(right=False)
        kept = min(right, len(ids) - 1, len(guess) - 1)  # the last id said is always to be fed
        trim_all(self._prefix.caches, len(guess) - 1 - kept)
