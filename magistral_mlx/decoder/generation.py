"""A reply on the model's thread: its prompt read behind what was read before, then ids one by one.

Knows the engine and the prefix it works on. Does not know text, or who asks.
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
    """How a model's replies are drafted."""

    pace: Pace
    model: Transformer | None
    """Another one, which guesses; None: what the last ids were followed by before is looked up."""


class Generation:
    """One reply on the model's thread, and how much of its prompt an earlier turn had read."""

    def __init__(
        self, model: Transformer, request: Request, prefix: Prefix, drafting: Drafting | None = None
    ) -> None:
        self.model = model
        self.prefix = prefix
        self.request = request
        self._drafting = drafting
        self._speculation: Speculation | None = None
        self.logits: mx.array | None = None  # that follow the prompt, if it is read
        self.reused = 0

    @property
    def passes(self) -> int | None:
        """Forward passes behind the ids so far; None: one each."""
        return self._speculation and self._speculation.passes

    def run(self) -> Generator[int | None, Guide | None, None]:
        """None for each piece of prompt that is read, then ids; a guide sent in says how it goes on."""
        try:
            yield from self._run()
        except Exception:  # arrays whose evaluation failed would fail again: the next turn reads anew
            self.prefix.restart()
            raise

    def _run(self) -> Generator[int | None, Guide | None, None]:
        prefix = self.prefix
        logits = yield from self._read()
        said = yield from self._decode(logits)
        guide: Guide | None = None
        while True:
            try:
                token = said.send(guide)
            except StopIteration:
                return
            prefix.ids.append(token)
            guide = yield token
            prefix.ids += guide.forced if guide else ()

    def follow(self, other: "Generation") -> None:
        """Take over, from one that has just read its prompt, the beginning that both prompts have.

        Not where a cache would be packed for one of them only: this reply is to say what it says alone.
        """
        ours, theirs, after = self.request.prompt, other.request.prompt, self.prefix.caches[0].after
        if (len(ours) > after) != (len(theirs) > after):
            return
        self.prefix = other.prefix.fork()
        self.prefix.cut(common(ours, theirs))
        if ours == theirs:
            self.logits = other.logits

    def row(self, chunk: int | None) -> Generator[None, object, Row]:
        """Read the prompt, by pieces of `chunk` ids or of what is sent in → what is decoded with others.

        Whoever does that notes the ids in the prefix, and restarts it on errors.
        """
        logits = yield from self._read(chunk)
        return Row(self.request, logits, self.prefix.caches)

    def _read(self, chunk: int | None = None) -> Generator[None, object, mx.array]:
        prompt = self.request.prompt
        if self.logits is not None:  # taken over, with all of the prompt
            self.reused = len(prompt)
            yield None
            return self.logits
        self.reused = self.prefix.rewind(prompt)
        self.logits = yield from _read(self.model, prompt[self.reused :], self.prefix.caches, chunk)
        return self.logits

    def _decode(self, logits: mx.array) -> Generator[None, object, Generator[int, Guide | None, None]]:
        """The loop, with drafts or without. A draft model reads the prompt first."""
        request = self.request
        decode = partial(engine.decode, allowed=request.allowed)
        # Drafts know nothing of what may be drawn.
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
        """Who guesses; what a draft model has read is kept beside the prefix."""
        prompt = self.request.prompt
        if model is None:
            return PromptLookup(prompt)
        prefix = self.prefix.draft = self.prefix.draft or Prefix(model.new_caches())
        reused = prefix.rewind(prompt)
        yield from _read(model, prompt[reused:], prefix.caches)
        return DraftModel(model, prefix, self.request.sampler)


def _read(
    model: Transformer, ids: Sequence[int], caches: Sequence[KVCache], chunk: int | None = None
) -> Generator[None, object, mx.array]:
    """Feed a prompt, by pieces of `chunk` ids or of what is sent in; yields after each, the last one too."""
    fed = engine.prefill(model, ids, caches, chunk=chunk or engine.PREFILL_CHUNK)
    sent: object = None
    while True:
        try:
            fed.send(sent if isinstance(sent, int) else None)
        except StopIteration as done:
            yield None
            return done.value
        sent = yield None
