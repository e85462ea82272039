"""A `Magistral` that generates given ids, whatever the prompt."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from magistral_mlx.chat import Magistral
from magistral_mlx.decoder.cache import KVCache
from magistral_mlx.disk.checkpoint import open_checkpoint
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.talk.worker import Worker
from magistral_mlx.text.tokenizer import Tokenizer

ENDS_OF_PROMPT = (4, 8)
"""`[/INST]` and `[/TOOL_RESULTS]`."""


class Script:
    """A fake `Transformer`: after any prompt its logits select `ids`, then `</s>`."""

    def __init__(self, ids: Sequence[int], tokenizer: Tokenizer, step_seconds: float) -> None:
        self.ids = list(ids)
        self.tokenizer = tokenizer
        self.step_seconds = step_seconds
        self.steps = 0

    dtype = mx.float32

    def new_caches(self, *_: object, **__: object) -> list[KVCache]:
        return [KVCache()]

    def __call__(self, ids: mx.array, caches: Sequence[KVCache], *, last: bool = False) -> mx.array:
        """Hidden states `(1, L, 1)`: the number of ids after the last prompt."""
        time.sleep(self.step_seconds)
        self.steps += 1
        cache, L = caches[0], ids.shape[1]
        fed = [*getattr(cache, "fed", [])[: cache.offset], *ids[0].tolist()]
        cache.fed = fed  # type: ignore[attr-defined]
        cache.update(mx.zeros((1, 1, L, 2)), mx.zeros((1, 1, L, 2)))
        end_of_prompt = max(at for at, token in enumerate(fed) if token in ENDS_OF_PROMPT) + 1
        return mx.arange(len(fed) - L, len(fed)).reshape(1, L, 1) + 1 - end_of_prompt

    def logits(self, h: mx.array) -> mx.array:
        generated = mx.clip(h[..., 0].astype(mx.int32), 0, len(self.ids))
        tokens = mx.array([*self.ids, self.tokenizer.eos_id])[generated]  # (1, L)
        return mx.where(mx.arange(self.tokenizer.vocab_size) == tokens[..., None], 100.0, 0.0)


def scripted(
    tokenizer: Tokenizer,
    reply: str | Sequence[int],
    *,
    max_context: int = 4096,
    step_seconds: float = 0.0,
    kind: type[Script] = Script,
) -> Magistral:
    """A `Magistral` with the demo's shape, this tokenizer, and one fixed reply."""
    ids = tokenizer.encode(reply) if isinstance(reply, str) else reply
    checkpoint = open_checkpoint(Path(DEMO))
    config = replace(checkpoint.config, max_context=max_context, vocab_size=tokenizer.vocab_size)
    checkpoint = replace(checkpoint, config=config)
    script = kind(ids, tokenizer, step_seconds)
    return Magistral(checkpoint, tokenizer, Worker("scripted"), script)  # type: ignore[arg-type]
