"""Prepares one reply: turns its options into the builder of its events and the decoder's request.

Raises here, before anything is computed, for invalid options and for a prompt that does not fit into the
context or into memory.
"""

import secrets
from array import array
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any

import mlx.core as mx

from magistral_mlx.checks import whole_number
from magistral_mlx.config import ModelConfig
from magistral_mlx.decoder.batch import Request
from magistral_mlx.decoder.logprobs import Scorer
from magistral_mlx.decoder.sampling import Sampler, Sampling
from magistral_mlx.errors import ContextError, PromptError
from magistral_mlx.structured.callgrammar import with_calls
from magistral_mlx.structured.constraint import Constraint
from magistral_mlx.structured.grammar import Vocabulary
from magistral_mlx.structured.shape import shape_of
from magistral_mlx.text.loops import LoopGuard
from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.text.toolcalls import CallParser
from magistral_mlx.text.transcript import Transcript

from .guard import Guard
from .options import MAX_TOKENS, Options, forced, offered
from .reply import ReplyBuilder


class Preparation:
    """Prepares the replies of one model."""

    def __init__(self, tokenizer: Tokenizer, guard: Guard, config: ModelConfig) -> None:
        self._tokenizer = tokenizer
        self._guard = guard
        self._config = config

    def __call__(
        self, prompt: Sequence[int], seed: int, options: Options, *, held: int = 0
    ) -> tuple[ReplyBuilder, Request]:
        """The builder of the reply's events, and the decoder's request for its ids.

        held: bytes of active memory that this reply already owns (its prefix), less the bytes that prompts of
            other replies have still to allocate.
        """
        self._check_ids(prompt)
        limit = self._limit(prompt, options.get("max_tokens", MAX_TOKENS))
        others = mx.get_active_memory() - self._guard.weights - held
        self._guard.check_reply(len(prompt), limit, held=max(others, 0))
        stop, schema, top = options.get("stop", ()), options.get("schema"), options.get("logprobs")
        shape = None if schema is None else shape_of(schema)
        tools, several = offered(options), options.get("parallel_tool_calls", True)
        grammar = with_calls(shape and shape.grammar, self._tokenizer, offered=tools, forced=forced(options))
        constraint = grammar and Constraint(grammar, self._vocabulary, think=options.get("think", True))
        scorer = None if top is None else Scorer(top)
        builder = ReplyBuilder(
            Transcript(
                self._tokenizer,
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                calls=CallParser(_call_id_key(prompt, seed), most=None if several else 1) if tools else None,
            ),
            self._tokenizer,
            prompt_ids=tuple(prompt),
            seed=seed,
            max_tokens=limit,
            think_budget=options.get("think_budget"),
            loops=LoopGuard() if options.get("loop_guard", False) else None,
            shape=shape,
            constraint=constraint,
            logprob=scorer and (lambda: scorer.last),
            watch=self._guard.check_context,
        )
        request = Request(
            prompt=list(prompt),
            sampler=Sampler(options.get("sampling", Sampling()), seed),
            limit=limit,
            allowed=constraint and constraint.mask(),
            scorer=scorer,
        )
        return builder, request

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._tokenizer)

    def _check_ids(self, prompt: Sequence[Any]) -> None:
        """MLX does not check ids: one out of range would read other memory."""
        most = self._config.vocab_size - 1
        wrong = [id_ for id_ in prompt if not (isinstance(id_, int) and 0 <= id_ <= most)]
        if wrong or not prompt:
            found = repr(wrong[0]) if wrong else "none"
            raise PromptError(f"a prompt is ids from 0 to {most}, and one at least; found {found}")

    def _limit(self, prompt: Sequence[int], max_tokens: int) -> int:
        """`max_tokens`, but no more than the context has room for after the prompt."""
        whole_number("max_tokens", max_tokens, least=1)
        context = self._config.max_context
        room = context - len(prompt)
        if room < 1:
            raise ContextError(
                f"the prompt is {len(prompt)} tokens long and the model's context {context}; "
                "shorten the question or the conversation"
            )
        return min(max_tokens, room)


def seed_of(options: Options) -> int:
    """The given seed, or a random one."""
    seed = options.get("seed")
    return secrets.randbits(32) if seed is None else whole_number("seed", seed, least=0)


def _call_id_key(prompt: Sequence[int], seed: int) -> str:
    """From which ids of tool calls are derived: the same for the same prompt and seed."""
    return f"{sha256(array('I', prompt).tobytes()).hexdigest()}/{seed}"
