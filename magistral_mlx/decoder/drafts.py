"""Draft tokens, for one verification pass to check several ids: prompt look-up, or a smaller model.

Drafts may be anything: those that the model itself does not sample are rejected (`speculation`). Knows ids,
the recent acceptance rate and, for a draft model, its caches. Does not know what a draft costs.
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
"""Lengths of the n-grams looked up, longest first: the longer a match, the likelier its continuation. Fewer
than 3 ids recur by chance too often."""
DECAY = 0.95
"""Weight decay of the acceptance rate per outcome: the last 20 or so decide."""
MAX_LAG = 64
"""Ids that a draft model may lag behind while drafting does not pay. With more it is not used again for this
reply, since catching up costs time too."""


class Rate:
    """Recent acceptance rate of drafts. Begins as if 2 had been seen, of which `start` were right."""

    def __init__(self, start: float = 1.0) -> None:
        self._start = start
        self._right = self._all = 0.0

    def record(self, *, right: bool) -> None:
        self._right = DECAY * self._right + right
        self._all = DECAY * self._all + 1

    @property
    def value(self) -> float:
        return (self._right + self._start) / (self._all + 2)


class Drafter(Protocol):
    """Receives every id of a reply, in order, and drafts those that follow."""

    def extend(self, ids: Sequence[int]) -> None:
        """These ids were generated next."""
        ...

    def rewind(self, n: int) -> None:
        """Take back the last `n` ids."""
        ...

    def chance(self) -> float:
        """Probability that an id of the next draft is right if those before it are; 0: there is no draft."""
        ...

    def propose(self, most: int) -> mx.array | None:
        """Up to `most` draft ids, `(k,)`, lazy; None: no draft."""
        ...


class PromptLookup:
    """Drafts what followed the last few ids earlier in the prompt or the reply.

    Indexes every n-gram of 3, 5 and 8 ids by where it last ended: three entries per id. Every draft id is
    compared with the id that came, verified by a pass or not, so acceptance rates cost nothing.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → index of the id after it
        self._rates = {size: Rate() for size in SIZES}
        for id_ in prompt:
            self._add(id_)
        self._found = self._find()

    def extend(self, ids: Sequence[int]) -> None:
        for id_ in ids:
            if self._found:
                size, index = self._found
                self._rates[size].record(right=self._ids[index] == id_)
            self._add(id_)
            self._found = self._find()

    def rewind(self, n: int) -> None:
        """Index entries of the removed ids may stay: a draft need not be right."""
        if n:
            del self._ids[-n:]
            self._found = self._find()

    def chance(self) -> float:
        return self._rates[self._found[0]].value if self._found else 0.0

    def propose(self, most: int) -> mx.array | None:
        """What came next then; at the end of the ids it wraps around, continuing a repetition."""
        if not self._found:
            return None
        _, index = self._found
        period = len(self._ids) - index
        return mx.array([self._ids[index + at % period] for at in range(most)])

    def _add(self, id_: int) -> None:
        ids = self._ids
        for size in SIZES:
            if len(ids) >= size:
                self._after[(*ids[-size:],)] = len(ids)
        ids.append(id_)

    def _find(self) -> tuple[int, int] | None:
        """The longest n-gram at the end that occurred before: its length, and the index after it."""
        ids = self._ids
        for size in SIZES:
            index = self._after.get((*ids[-size:],), len(ids))
            if size <= len(ids) and index < len(ids):
                return size, index
        return None


class DraftModel:
    """Drafts with a smaller model of the same vocabulary, sampling with the same noise.

    prefix: its caches and the ids they hold; the reply's ids are added to them.
    """

    def __init__(self, model: Transformer, prefix: Prefix, sampler: Sampler) -> None:
        self._model = model
        self._prefix = prefix
        self._sampler = sampler
        self._rate = Rate(1.6)  # optimistic: the user chose this model, and only trying tells
        self._draft: mx.array | None = None  # not compared yet; the caches hold all of it but the last id
        self._seen: mx.array | None = None

    def extend(self, ids: Sequence[int]) -> None:
        self._compare(ids)
        self._prefix.ids += ids
        if self._seen is not None and ids:
            self._seen = marked(self._seen, mx.array([*ids]))

    def rewind(self, n: int) -> None:
        self._draft = None
        if n:
            del self._prefix.ids[-n:]
        self._prefix.trim()

    def chance(self) -> float:
        return self._rate.value if self._lag <= MAX_LAG else 0.0

    def propose(self, most: int) -> mx.array | None:
        prefix, position = self._prefix, len(self._prefix.ids)
        ids = mx.array([prefix.ids[-self._lag :]])
        draft = list[mx.array]()
        seen: mx.array | None = None
        for at in range(most):
            hidden = self._model(ids, prefix.caches, last=True)
            logits = self._model.logits(hidden)[0, 0]
            seen = self._seen_ids(logits) if at == 0 else marked(seen, draft[-1])
            # Unsettled (-1): any id will do as a draft.
            draft.append(mx.maximum(self._sampler.draw(logits, position + at, seen), 0))
            ids = draft[-1].reshape(1, 1)
        self._draft = mx.stack(draft)
        return self._draft

    @property
    def _lag(self) -> int:
        return len(self._prefix.ids) - self._prefix.caches[0].offset

    def _seen_ids(self, logits: mx.array) -> mx.array | None:
        """Ids that a repetition penalty affects: built once, then updated by `extend`."""
        if self._seen is None:
            self._seen = seen_in(self._sampler, self._prefix.ids, logits)
        return self._seen

    def _compare(self, ids: Sequence[int]) -> None:
        """Compare the last draft with the generated ids, and trim what was rejected from the caches."""
        if self._draft is None:
            return
        draft, self._draft = cast("list[int]", self._draft.tolist()), None
        accepted = sum(takewhile(bool, map(eq, draft, ids)))
        for _ in range(accepted):
            self._rate.record(right=True)
        if accepted < len(draft):
            self._rate.record(right=False)
        kept = min(accepted, len(ids) - 1, len(draft) - 1)  # the last generated id is always fed anew
        trim_all(self._prefix.caches, len(draft) - 1 - kept)
