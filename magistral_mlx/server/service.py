"""The model behind the routes: replies are decoded in one continuous batch, and reuse prefixes.

Knows the library. Does not know HTTP, or the format of a response.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from magistral_mlx.chat import Magistral
from magistral_mlx.decoder.prefix import Prefix
from magistral_mlx.errors import ClosedError, MagistralError, MemoryLimitError
from magistral_mlx.events import Finished, FinishReason
from magistral_mlx.talk.options import Options
from magistral_mlx.talk.reply import Reply
from magistral_mlx.talk.stream import Stream

from . import failures
from .metrics import Metrics
from .rendering import Delta, Rendering
from .replies import Choice, ChoiceEnd
from .slots import ClosingError, Slots

T = TypeVar("T")
ChoiceEvent: TypeAlias = tuple[int, Delta | ChoiceEnd]
"""The index of a choice, and its next delta or its end."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one request asks for: `n` choices of each prompt, numbered prompt by prompt."""

    prompts: Sequence[list[int]]
    options: Options
    rendering: Callable[[], Rendering]
    n: int = 1
    id: str = ""
    """Names the job for `stop_thinking`."""

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n


class Service:
    """A model with its slots, prefix cache, batch and metrics."""

    def __init__(
        self,
        model: Magistral,
        *,
        ids: Sequence[str],
        running: int,
        waiting: int,
        prefix_bytes: int | None = None,
    ) -> None:
        self.model = model
        self.ids = list(ids)
        self.slots = Slots(running=running, waiting=waiting)
        self.prefixes = model.new_prefixes(prefix_bytes)
        self._batch = model.new_continuous_batch()
        self._rows = asyncio.Semaphore(running)  # one per reply: a request may have several
        self.metrics = Metrics(self.slots, self.prefixes)
        self._streams: WeakKeyDictionary[Stream, str] = WeakKeyDictionary()  # → the id of its job
        self._lent: WeakKeyDictionary[Stream, list[Prefix]] = WeakKeyDictionary()

    async def begin(self, job: Job) -> Stream:
        """Open the stream of the first choice: a mistake in the request raises here."""
        return await self._open(job, 0)

    async def run(self, job: Job, first: Stream) -> AsyncGenerator[ChoiceEvent]:
        """All choices of a job concurrently: their events, as they come."""
        read = [asyncio.Event() for _ in job.prompts]  # set when a prompt has been read
        choices = [self._choice(job, index, read, None if index else first) for index in range(job.choices)]
        async with aclosing(_merged(choices)) as events:
            async for event in events:
                yield event

    async def choices(self, job: Job) -> list[Choice]:
        """All choices of a job, complete."""
        deltas: list[list[Delta]] = [[] for _ in range(job.choices)]
        ends: dict[int, ChoiceEnd] = {}
        async with await self.begin(job) as first, aclosing(self.run(job, first)) as events:
            async for index, event in events:
                if isinstance(event, Delta):
                    deltas[index].append(event)
                else:
                    ends[index] = event
        return [Choice(deltas[index], ends[index]) for index in range(job.choices)]

    def stop_thinking(self, id_: str) -> bool:
        """End the reasoning of a job's replies; False: no job of that id is running."""
        running = [stream for stream, of in list(self._streams.items()) if of == id_ and stream.is_open]
        for stream in running:
            stream.stop_thinking()
        return bool(running)

    def close(self) -> None:
        """End running replies, and refuse waiting requests."""
        self.slots.close()
        for stream in list(self._streams):
            stream.close()

    async def _choice(
        self, job: Job, index: int, read: Sequence[asyncio.Event], first: Stream | None
    ) -> AsyncGenerator[ChoiceEvent]:
        """One choice. A prompt's other choices wait until the first has read it, and reuse its prefix."""
        rendering, prompt_read = job.rendering(), read[index // job.n]
        leads = index % job.n == 0
        reason: FinishReason | None = None
        try:
            if not leads:
                await prompt_read.wait()
            async with first or await self._open(job, index, shared=not leads) as stream:
                received = sent = 0  # ids
                async for event in stream:
                    if leads and job.n > 1 and not prompt_read.is_set():
                        await self._share(stream)
                        prompt_read.set()
                    received += len(event.token_ids)
                    if any(delta := rendering.render(event)):
                        logprobs = stream.logprobs[sent:received] if delta.text else ()
                        yield index, delta._replace(logprobs=logprobs) if logprobs else delta
                    if any(delta) or not rendering.holds_back:
                        sent = received
                    if isinstance(event, Finished):
                        reason = event.reason
                    elif rendering.stopped:
                        reason = "stop"
                        break
        finally:
            prompt_read.set()
        if reason is None:  # closed by `close`
            raise ClosingError
        reply = stream.reply
        yield index, ChoiceEnd(reason, reply.stats, reply.tool_calls, reply.stop_string)

    async def _open(self, job: Job, index: int, *, shared: bool = False) -> Stream:
        """Open a stream that reuses a cached prefix; if memory is short, clear the prefix cache and retry."""
        prompt, options = job.prompts[index // job.n], _seeded(job.options, index)
        await self._rows.acquire()
        try:
            try:
                stream = await self._stream(self.prefixes.take(prompt, shared=shared), prompt, options)
            except MemoryLimitError:
                self.prefixes.clear()
                stream = await self._stream(self.prefixes.take(prompt), prompt, options)
        except BaseException:
            self._rows.release()
            raise
        self._streams[stream] = job.id
        return stream

    async def _stream(self, prefix: Prefix, prompt: list[int], options: Options) -> Stream:
        lent = [prefix]  # emptied at the end: a reference to the stream must not keep its arrays

        def ended(reply: Reply) -> None:
            self._rows.release()
            self.metrics.replied(reply)
            # The conversation's next prompt leaves out this reasoning, unless it led to a tool call.
            kept = 0 if reply.thinking and not reply.tool_calls else len(reply.token_ids)
            self._keep(lent.pop(), len(prompt) + kept)

        try:
            begin = partial(
                self.model.stream_ids, prompt, prefix=prefix, batch=self._batch, on_end=ended, **options
            )
            # Compiling a grammar, for a schema or for required tool calls, may take a while.
            compiles = options.get("schema") or options.get("tools")
            stream = await asyncio.to_thread(begin) if compiles else begin()
        except MemoryLimitError:
            raise
        except MagistralError:  # a mistake in the request: the prefix is unchanged
            self._keep(prefix, prefix.length)
            raise
        self._lent[stream] = lent
        return stream

    async def _share(self, stream: Stream) -> None:
        """Put a fork of an open stream's prompt into the prefix cache, for the other choices."""

        def share() -> None:
            for prefix in self._lent[stream]:
                self.prefixes.put(prefix.fork(), len(stream.reply.prompt_ids))

        await asyncio.wrap_future(self.model.submit(share))

    def _keep(self, prefix: Prefix, length: int) -> None:
        """Return a prefix to the cache: on the model's thread, after a step that may still be running."""
        with suppress(ClosedError):
            self.model.submit(lambda: self.prefixes.put(prefix, length)).add_done_callback(_log)


def _log(kept: Future[None]) -> None:
    if isinstance(error := kept.exception(), Exception):
        failures.log(error)


def _seeded(options: Options, index: int) -> Options:
    """Each choice has its own seed: the request's, plus the choice's index."""
    seed = options.get("seed")
    return options if seed is None else {**options, "seed": seed + index}


async def _merged(sources: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """The items of all sources, as they come."""
    coming = {asyncio.ensure_future(anext(source)): source for source in sources}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                source = coming.pop(task)
                with suppress(StopAsyncIteration):
                    item = task.result()
                    coming[asyncio.ensure_future(anext(source))] = source
                    yield item
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for source in sources:
            await source.aclose()
