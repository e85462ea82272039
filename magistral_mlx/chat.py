"""A loaded model that answers messages: where text modules and array modules meet.

`Magistral` turns messages into token ids, and ids into a `Stream`. Does not know how replies are displayed,
and leaves every rule to the module that owns it: prompts to `tokenizer`, options to `preparation`, events to
`reply`, decoding to `generation`, timing and threads to `stream`, `continuous` and `worker`, message history
to `conversation`.
"""

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, TypeVar, Unpack, get_args, overload

import mlx.core as mx

from . import memory
from .checks import whole_number
from .decoder.generation import Drafting, Generation
from .decoder.model import Transformer
from .decoder.pace import Pace
from .decoder.prefix import Prefix
from .decoder.prefixes import Prefixes
from .disk import manifest
from .disk.checkpoint import Checkpoint, load, open_checkpoint
from .disk.tensorfile import NAMES
from .errors import CheckpointError, ClosedError, MagistralWarning, PromptError, SamplingError
from .fetch import hub
from .structured.grammar import Regex
from .talk import saving
from .talk.continuous import ContinuousBatch
from .talk.conversation import Conversation
from .talk.guard import Guard
from .talk.options import Options, Plain, check, offered
from .talk.preparation import Preparation, seed_of
from .talk.reply import Reply
from .talk.stream import OnDemand, Stream
from .talk.worker import Pending, Worker
from .text.prompt import Messages
from .text.tokenizer import Tokenizer

T = TypeVar("T")
DType: TypeAlias = Literal["bfloat16", "float16", "float32"]
KVBits: TypeAlias = Literal[8]

AT_ONCE = 8
"""Most replies at once, by default. At Magistral's shape, eight of 4000 tokens take 5 GB of KV cache."""


class Magistral:
    """A loaded model. Create one with `load`; use it from any thread, or from asyncio."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        worker: Worker,
        model: Transformer,
        *,
        kv_bits: KVBits | None = None,
        quantize_after: int = 0,
        guard: Guard | None = None,
        draft: Transformer | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self.path = checkpoint.path
        self.config = checkpoint.config
        self.tokenizer = tokenizer
        self.kv_bits = kv_bits
        self.quantize_after = quantize_after
        self._guard = guard or _guard(checkpoint, None, model.dtype, kv_bits, quantize_after)
        self._prepare = Preparation(tokenizer, self._guard, self.config)
        self._worker = worker
        self._model: Transformer | None = model
        self._draft = draft
        self._pace = Pace()

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: DType | None = None,
        kv_bits: KVBits | None = None,
        quantize_after: int = 0,
        draft_model: str | Path | None = None,
    ) -> Self:
        """Load a model: a directory, a name on the Hub that was downloaded before, or "demo".

        dtype: of the activations; by default bfloat16 on a GPU and float32 on a CPU.
        kv_bits: 8 quantizes the KV cache, to about half the memory; see `magistral-mlx plan`.
        quantize_after: with `kv_bits`, the number of positions up to which a cache stays unquantized; the
            next position quantizes all of it.
        draft_model: a smaller model with the same vocabulary, which drafts tokens for this one; replies then
            use speculative decoding (see `Options`), and are the same as without it.
        Nothing is downloaded. Before any weights are read, a model that would not fit into this machine's
        memory is refused.
        """
        _check_choice("dtype", dtype, get_args(DType))
        _check_choice("kv_bits", kv_bits, get_args(KVBits))
        if whole_number("quantize_after", quantize_after, least=0) and kv_bits is None:
            raise SamplingError("quantize_after is for an 8-bit KV cache; give kv_bits=8 too")
        found = hub.resolve(str(name))
        checkpoint = open_checkpoint(found.weights)
        for difference in manifest.wrong_sizes(found.weights):
            warnings.warn(f"{found.weights}: {difference}; convert it again", MagistralWarning, stacklevel=2)
        mx_dtype = getattr(mx, dtype) if dtype else memory.default_dtype()
        draft = None if draft_model is None else _open_draft(str(draft_model), checkpoint)
        guard = _guard(checkpoint, draft, mx_dtype, kv_bits, quantize_after)
        guard.check_load(str(name))
        worker = Worker(f"magistral {found.weights.name}")
        model: Pending[Transformer] = worker.submit(lambda: load(checkpoint, mx_dtype))
        drafter = worker.submit(lambda: draft and load(draft, mx_dtype))
        try:
            tokenizer = Tokenizer.from_directory(
                found.tokenizer
            )  # a second or two, while the weights are read
            tokenizer.detokenizer()  # looks up the bytes of all ids now, not in the first stream
            return cls(
                checkpoint,
                tokenizer,
                worker,
                model.wait(),
                kv_bits=kv_bits,
                quantize_after=quantize_after,
                guard=guard,
                draft=drafter.wait(),
            )
        except BaseException:
            worker.close()
            raise

    def stream(self, messages: Messages, **options: Unpack[Options]) -> Stream:
        """Start a reply to a question, or to `{"role", "content"}` messages. Nothing is computed yet."""
        return self.stream_ids(self.encode(messages, **options), **options)

    @overload
    def ask(self, messages: Messages, *, schema: type[T], **options: Unpack[Plain]) -> T: ...
    @overload
    def ask(self, messages: Messages, *, schema: Mapping[str, Any], **options: Unpack[Plain]) -> Any: ...
    @overload
    def ask(self, messages: Messages, *, schema: Regex, **options: Unpack[Plain]) -> str: ...
    @overload
    def ask(self, messages: Messages, *, n: int, **options: Unpack[Options]) -> list[Reply]: ...
    @overload
    def ask(self, messages: Messages, **options: Unpack[Plain]) -> Reply: ...
    def ask(self, messages: Messages, *, n: int | None = None, **options: Unpack[Options]) -> Any:
        """Wait for the whole reply and return it; with `n`, a list of `n` replies (see `ask_many`).

        With a `schema`, return the value: an instance of that type, parsed JSON, or text that a `Regex`
        matches. With both, return replies, whose `parsed` is the value: any of them may have been cut off.

        Raises:
            AnswerError: with a `schema`, and without `n`: the answer was cut off, or its type rejects it.
        """
        if n is not None:
            return self.ask_many(_repeated(messages, n), **options)
        reply = self.stream(messages, **options).drain()
        return reply if options.get("schema") is None else reply.parsed

    def ask_many(
        self, questions: Sequence[Messages], *, at_once: int | None = None, **options: Unpack[Options]
    ) -> list[Reply]:
        """A reply to each question, decoded together; a prefix that neighbouring prompts share is read once.

        Each has its own seed: `seed`, `seed + 1`, …, and is the same as when asked alone with that seed (in
        float32). Seconds in a reply's statistics are of passes that it shares with others.

        at_once: how many replies are decoded at once, each with its own KV cache; when one ends, the next
            starts. By default as many as fit into this machine's memory, at most 8.
        """
        with self._open_batch(questions, at_once, options) as streams:
            return [stream.drain() for stream in streams]

    def astream(self, messages: Messages, **options: Unpack[Options]) -> Stream:
        """`stream`, for `async for`: the same stream serves both."""
        return self.stream(messages, **options)

    @overload
    async def aask(self, messages: Messages, *, schema: type[T], **options: Unpack[Plain]) -> T: ...
    @overload
    async def aask(
        self, messages: Messages, *, schema: Mapping[str, Any], **options: Unpack[Plain]
    ) -> Any: ...
    @overload
    async def aask(self, messages: Messages, *, schema: Regex, **options: Unpack[Plain]) -> str: ...
    @overload
    async def aask(self, messages: Messages, *, n: int, **options: Unpack[Options]) -> list[Reply]: ...
    @overload
    async def aask(self, messages: Messages, **options: Unpack[Plain]) -> Reply: ...
    async def aask(self, messages: Messages, *, n: int | None = None, **options: Unpack[Options]) -> Any:
        """`ask`, for `await`."""
        if n is not None:
            return await self.aask_many(_repeated(messages, n), **options)
        reply = await self.stream(messages, **options).adrain()
        return reply if options.get("schema") is None else reply.parsed

    async def aask_many(
        self, questions: Sequence[Messages], *, at_once: int | None = None, **options: Unpack[Options]
    ) -> list[Reply]:
        """`ask_many`, for `await`; cancelling it stops all replies."""
        with self._open_batch(questions, at_once, options) as streams:
            return [await stream.adrain() for stream in streams]

    def conversation(self, **options: Unpack[Options]) -> Conversation:
        """A conversation with these options for every reply."""
        return Conversation(self, options)

    def load_conversation(
        self, path: str | Path, *, any_model: bool = False, **options: Unpack[Options]
    ) -> Conversation:
        """A conversation from the file that `Conversation.save` wrote; `options` override the saved ones.

        any_model: also accept a conversation with another model; this one then prefills its messages again.

        Raises:
            ConversationError: the file is not a complete saved conversation, is of another model, or was
                written by a newer version.
        """
        saved = saving.load(Path(path), self, any_model=any_model)
        return Conversation(self, {**saved.options, **options}, turns=saved.turns, prefix=saved.prefix)

    def encode(self, messages: Messages, **options: Unpack[Options]) -> list[int]:
        """The token ids of the prompt that `stream` would prefill."""
        return self.tokenizer.encode_chat(
            messages,
            system=options.get("system"),
            think=options.get("think", True),
            keep_thinking=options.get("keep_thinking", False),
            tools=offered(options),
        )

    def stream_ids(
        self,
        prompt: Sequence[int],
        *,
        prefix: Prefix | None = None,
        batch: ContinuousBatch | None = None,
        on_end: Callable[[Reply], None] = lambda _: None,
        **options: Unpack[Options],
    ) -> Stream:
        """`stream`, for a prompt that is already encoded.

        prefix: KV caches of an earlier turn, to be reused; nothing else may use them until `on_end`, which is
            called once, with the reply.
        batch: decode together with the others of this batch (`new_continuous_batch`); without one, open
            streams take turns.
        """
        check(options)
        prefix = prefix or self.new_prefix(self.kv_bits)
        unallocated = batch.unallocated if batch else 0
        builder, request = self._prepare(prompt, seed_of(options), options, held=prefix.nbytes - unallocated)
        if batch:
            kv_bytes = self._guard.kv(len(prompt))
            generation = Generation(self.transformer, request, prefix)
            return Stream(batch.join(generation, builder, kv_bytes=kv_bytes), builder, on_end=on_end)
        drafting = None
        if options.get("speculate", self._draft is not None):
            drafting = Drafting(pace=self._pace, model=self._draft)
        generation = Generation(self.transformer, request, prefix, drafting)
        source = OnDemand(
            self._worker,
            generation.run(),
            reused=lambda: generation.reused,
            passes=lambda: generation.passes,
        )
        return Stream(source, builder, on_end=on_end)

    def close(self) -> None:
        """Free the model's memory. A stream that is still open raises `ClosedError`."""
        self._model = self._draft = None
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_prefix(self, kv_bits: int | None = None, *, quantize_after: int | None = None) -> Prefix:
        """Empty KV caches; see `Transformer.new_caches`. `quantize_after` defaults to the model's own."""
        after = self.quantize_after if quantize_after is None else quantize_after
        return Prefix(self.transformer.new_caches(kv_bits, quantize_after=after))

    def new_continuous_batch(self) -> ContinuousBatch:
        """A batch of replies that are decoded together; add each with `stream_ids(…, batch=…)`."""
        return ContinuousBatch(self._worker)

    def run(self, job: Callable[[], T]) -> T:
        """Run a job on the thread that owns the model's arrays, and wait for it."""
        return self._worker.run(job)

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """`run`, without waiting."""
        return self._worker.submit(job)

    def new_prefixes(self, limit: int | None = None) -> Prefixes:
        """A pool of KV caches for prefix reuse. limit: bytes, by default an eighth of what weights leave."""
        return Prefixes(
            lambda: self.new_prefix(self.kv_bits), self._guard.for_prefixes if limit is None else limit
        )

    @property
    def at_once(self) -> int:
        """How many long replies fit into this machine's memory at once: 1 to 8."""
        return self._guard.at_once(AT_ONCE)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the activations."""
        return self.transformer.dtype

    def fingerprint(self) -> dict[str, Any]:
        """Equal for two models only if one can continue from the other's KV cache. Plain JSON."""
        weights = self.run(self._checkpoint.fingerprint)
        return self.config.to_json() | {"dtype": NAMES[self.dtype], "weights": weights}

    @property
    def transformer(self) -> Transformer:
        """The decoder itself. Its arrays belong to the model's thread: use it in a job of `run`."""
        if self._model is None:
            raise ClosedError("this model was closed; load it again")
        return self._model

    @contextmanager
    def _open_batch(
        self, questions: Sequence[Messages], at_once: int | None, options: Options
    ) -> Generator[list[Stream]]:
        """Streams that advance without a consumer. Invalid input raises before anything is computed."""
        if isinstance(questions, str):
            raise PromptError("ask_many takes a list of questions, found one string; ask takes one")
        check(options)
        at_once = self.at_once if at_once is None else whole_number("at_once", at_once, least=1)
        seed = seed_of(options)
        prompts = [self.encode(messages, **options) for messages in questions]
        prepared = [self._prepare(prompt, seed + at, options) for at, prompt in enumerate(prompts)]
        batch = ContinuousBatch(self._worker, at_once=at_once, streaming=False)
        with ExitStack() as open_streams:
            streams = list[Stream]()
            for builder, request in prepared:
                generation = Generation(self.transformer, request, self.new_prefix(self.kv_bits))
                stream = Stream(batch.join(generation, builder), builder, whole=True)
                streams.append(open_streams.enter_context(stream))
            for stream in streams:
                stream.start()
            yield streams


def _open_draft(name: str, target: Checkpoint) -> Checkpoint:
    """The checkpoint of a draft model. Its ids must mean the same; only their number is checked."""
    draft = open_checkpoint(hub.resolve(name).weights)
    ours, theirs = target.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise CheckpointError(
            f"a draft model must have the same vocabulary as the model: expected {ours} ids, found "
            f"{theirs} in {name}; use a smaller model of the same family"
        )
    return draft


def _guard(
    checkpoint: Checkpoint,
    draft: Checkpoint | None,
    dtype: mx.Dtype,
    kv_bits: KVBits | None,
    quantize_after: int,
) -> Guard:
    """The memory guard for these weights."""
    weights = checkpoint.nbytes(dtype) + (draft.nbytes(dtype) if draft else 0)
    return Guard(
        checkpoint.config, weights, itemsize=dtype.size, kv_bits=kv_bits, quantize_after=quantize_after
    )


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value is not None and value not in choices:
        raise SamplingError(f"{name} is {' or '.join(map(repr, choices))}, or is left out; found {value!r}")


def _repeated(messages: Messages, n: int) -> list[Messages]:
    return [messages] * whole_number("n", n, least=1)
