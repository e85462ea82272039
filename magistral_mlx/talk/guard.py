"""Memory checks before loads and replies: refuses what cannot fit, and warns once of what might not.

The figures come from `memory`. Does not know what is in a reply.
"""

import warnings
from dataclasses import replace

from magistral_mlx import memory
from magistral_mlx.config import ModelConfig
from magistral_mlx.errors import MagistralWarning, MemoryLimitError
from magistral_mlx.memory import USUAL_CONTEXT, MemoryPlan

REPLY = 4096
"""Tokens of a long reply with its prompt, as assumed for the number of replies decoded at once."""


class Guard:
    """The memory checks of one model."""

    def __init__(
        self,
        config: ModelConfig,
        weights: int,
        *,
        itemsize: int,
        kv_bits: int | None = None,
        quantize_after: int = 0,
    ) -> None:
        self._usual = min(USUAL_CONTEXT, config.max_context)
        machine = memory.this_machine()
        self._plan = MemoryPlan(
            config=config,
            weights=weights,
            context=self._usual,
            machine=machine,
            itemsize=itemsize,
            kv_bits=kv_bits,
            quantize_after=quantize_after,
        )
        self._warned: set[str] = set()

    @property
    def weights(self) -> int:
        """Bytes of the weights, a draft model's included."""
        return self._plan.weights

    @property
    def for_prefixes(self) -> int:
        """Bytes for the KV caches of earlier prompts: an eighth of what the weights leave."""
        return max(self._plan.machine.budget - self._plan.weights, 0) // 8

    def kv(self, positions: int) -> int:
        """Bytes of the KV cache of so many positions."""
        return replace(self._plan, context=positions).kv

    def at_once(self, most: int) -> int:
        """How many replies, of `REPLY` tokens each, may be decoded at once: 1 to `most`."""
        plan = replace(self._plan, context=REPLY, held=self.for_prefixes)
        return max(1, min(most, (plan.machine.budget - plan.total) // plan.kv + 1))

    def check_load(self, source: str) -> None:
        """Before weights are read: warns if the usual context does not fit.

        Refuses if not even 1024 positions fit, with an 8-bit KV cache either.
        """
        plan = self._plan
        if plan.fits:
            return
        if plan.remedies:
            message = f"{self._usual:,} tokens of context with {source} take {plan.excess()}; {plan.advice()}"
            self._warn("load", message)
            return
        least = plan.at(1024)
        advice = least.advice()
        if plan.config.quantization is None:
            advice = f"quantize it first: magistral-mlx convert {source} --out DIR --bits 4"
        raise MemoryLimitError(f"{source} takes {least.excess()}; {advice}")

    def check_reply(self, prompt: int, max_tokens: int, *, held: int = 0) -> None:
        """Before prefill: refuses a prompt that does not fit. Lengths in tokens; held: bytes held by others.

        Nothing is reserved for the reply: if it could outgrow memory, there is one warning.
        """
        plan = replace(self._plan, context=prompt, held=held)
        if not plan.fits:
            raise MemoryLimitError(f"the prompt of {prompt:,} tokens takes {plan.excess()}; {plan.advice()}")
        whole = replace(plan, context=prompt + max_tokens, prompt=prompt)
        if not whole.fits:
            self._warn(
                "reply",
                f"a reply of {max_tokens:,} tokens may run out of memory: with the prompt it would take "
                f"{whole.excess()}; {whole.advice()}",
            )
        self.check_context(prompt)

    def check_context(self, context: int) -> None:
        """While a reply grows: warns once that the context is longer than the model card advises."""
        if context > USUAL_CONTEXT:
            self._warn("context", f"past {USUAL_CONTEXT:,} tokens of context the model's quality drops")

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, MagistralWarning, stacklevel=3)
