"""One reply on the model's thread: prefill behind a reused prefix, then ids one by one.

Knows the engine and the prefix it works on. Does not know text, or who requested the reply.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from magistral_mlx.wire import Guide

from . import engine
from .batch import Request, Row
from .cache import KVCache
from .drafts import Drafter, DraftModel, PromptLookup
from .model import Transformer
from .pace import Pace
from .prefix import Prefix, common
from .speculation import Speculation


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """How ids are drafted for a model's replies."""

    pace: Pace
    model: Transformer | None
    """The draft model; None: prompt look-up."""


class Generation:
    """One reply on the model's thread.

    reused: prompt ids that were not prefilled, because the prefix held them.
    """

    def __init__(
        self, model: Transformer, request: Request, prefix: Prefix, drafting: Drafting | None = None
    ) -> None:
        self.model = model
        self.prefix = prefix
        self.request = request
        self._drafting = drafting
        self._speculation: Speculation | None = None
        self.logits: mx.array | None = None  # that follow the prompt, once it is prefilled
        self.reused = 0

    @property
    def passes(self) -> int | None:
        """Forward passes for the ids so far; None: one each."""
        return self._speculation and self._speculation.passes

    def run(self) -> Generator[int | None, Guide | None, None]:
        """Yields None per prefill chunk, then ids; a `Guide` sent in applies after the id just yielded."""
        try:
            yield from self._run()
        except Exception:  # arrays that failed to evaluate would fail again: the next turn prefills anew
            self.prefix.restart()
            raise

    def _run(self) -> Generator[int | None, Guide | None, None]:
        prefix = self.prefix
        logits = yield from self._prefill()
        decoding = yield from self._decode(logits)
        guide: Guide | None = None
        while True:
            try:
                token = decoding.send(guide)
            except StopIteration:
                return
            prefix.ids.append(token)
            guide = yield token
            prefix.ids += guide.forced if guide else ()

    def reuse_prefix(self, other: "Generation") -> None:
        """Fork the common prefix from `other`, which has just prefilled its prompt.

        Unless a cache would be quantized for one of the two only: this reply must be what it is alone.
        """
        ours, theirs, after = self.request.prompt, other.request.prompt, self.prefix.caches[0].after
        if (len(ours) > after) != (len(theirs) > after):
            return
        self.prefix = other.prefix.fork()
        self.prefix.cut(common(ours, theirs))
        if ours == theirs:
            self.logits = other.logits

    def row(self, chunk: int | None) -> Generator[None, object, Row]:
        """Prefill, in chunks of `chunk` ids or of a number sent in → a row for batched decoding.

        The caller then records its ids in the prefix, and restarts the prefix on errors.
        """
        logits = yield from self._prefill(chunk)
        return Row(self.request, logits, self.prefix.caches)

    def _prefill(self, chunk: int | None = None) -> Generator[None, object, mx.array]:
        prompt = self.request.prompt
        if self.logits is not None:  # taken over from an equal prompt
            self.reused = len(prompt)
            yield None
            return self.logits
        self.reused = self.prefix.rewind(prompt)
        self.logits = yield from _prefill_chunks(self.model, prompt[self.reused :], self.prefix.caches, chunk)
        return self.logits

    def _decode(self, logits: mx.array) -> Generator[None, object, Generator[int, Guide | None, None]]:
        """The decode loop, speculative or plain. A draft model prefills the prompt first."""
        request = self.request
        decode = partial(engine.decode, allowed=request.allowed)
        # Drafts do not respect masks.
        if self._drafting and request.allowed is None and self._drafting.pace.pays():
            drafter = yield from self._drafter(self._drafting.model)
            self._speculation = Speculation(drafter, self._drafting.pace)
            decode = self._speculation.decode
        return decode(
            self.model,
            logits,
            self.prefix.caches,
            sampler=request.sampler,
            prompt=request.prompt,
            limit=request.limit,
            scorer=request.scorer,
        )

    def _drafter(self, model: Transformer | None) -> Generator[None, object, Drafter]:
        """The drafter; a draft model's caches are kept in `Prefix.draft`."""
        prompt = self.request.prompt
        if model is None:
            return PromptLookup(prompt)
        prefix = self.prefix.draft = self.prefix.draft or Prefix(model.new_caches())
        reused = prefix.rewind(prompt)
        yield from _prefill_chunks(model, prompt[reused:], prefix.caches)
        return DraftModel(model, prefix, self.request.sampler)


def _prefill_chunks(
    model: Transformer, ids: Sequence[int], caches: Sequence[KVCache], chunk: int | None = None
) -> Generator[None, object, mx.array]:
    """Prefill, in chunks of `chunk` ids or of a number sent in; yields after each, including the last."""
    prefilling = engine.prefill(model, ids, caches, chunk=chunk or engine.PREFILL_CHUNK)
    sent: object = None
    while True:
        try:
            prefilling.send(sent if isinstance(sent, int) else None)
        except StopIteration as done:
            yield None
            return done.value
        sent = yield None
