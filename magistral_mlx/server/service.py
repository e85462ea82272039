"""The model behind the routes: replies that take turns, and share what was read.

Knows the library. Does not know HTTP, nor the shape of an answer.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias
from weakref import WeakSet, WeakValueDictionary

from magistral_mlx.chat import Magistral
from magistral_mlx.decoder.prefix import Prefix
from magistral_mlx.errors import ClosedError, MagistralError, MemoryLimitError
from magistral_mlx.events import Finished, FinishReason
from magistral_mlx.talk.options import Options
from magistral_mlx.talk.reply import Reply
from magistral_mlx.talk.stream import Stream

from . import failures
from .metrics import Metrics
from .replies import Choice, Ended
from .slots import ClosingError, Slots
from .voices import Heard, Voice

Said: TypeAlias = tuple[int, Heard | Ended]
"""The number of a choice, and what comes next of it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one request wants: `n` choices of each prompt, one after another."""

    prompts: Sequence[list[int]]
    options: Options
    voice: Callable[[], Voice]
    n: int = 1
    id: str = ""
    """By which its reasoning can be ended."""


class Service:
    """A model, who may use it, what it has read, and what happened."""

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
        self.metrics = Metrics(self.slots, self.prefixes)
        self._streams: WeakSet[Stream] = WeakSet()
        self._by_id: WeakValueDictionary[str, Stream] = WeakValueDictionary()

    async def begin(self, job: Job) -> Stream:
        """The stream of the first choice: whatever is wrong with a job, is told here."""
        return await self._open(job, 0)

    async def run(self, job: Job, first: Stream) -> AsyncGenerator[Said]:
        """All choices of a job; each takes one step of the model at a time, so those of others go on too."""
        for index in range(len(job.prompts) * job.n):
            voice = job.voice()
            reason: FinishReason | None = None
            async with first if index == 0 else await self._open(job, index) as stream:
                self._by_id[job.id] = stream
                came = told = 0  # ids
                async for event in stream:
                    came += len(event.token_ids)
                    if any(heard := voice.hear(event)):
                        logprobs = stream.logprobs[told:came] if heard.text else ()
                        yield index, heard._replace(logprobs=logprobs) if logprobs else heard
                    if any(heard) or not voice.late:
                        told = came
                    if isinstance(event, Finished):
                        reason = event.reason
                    elif voice.stopped:
                        reason = "stop"
                        break
            if reason is None:  # closed by `close`
                raise ClosingError
            reply = stream.reply
            yield index, Ended(reason, reply.stats, reply.tool_calls, reply.stop_string)

    async def choices(self, job: Job) -> list[Choice]:
        """The same, waited for."""
        heard: list[Heard] = []
        done: list[Choice] = []
        async with await self.begin(job) as first, aclosing(self.run(job, first)) as told:
            async for _, said in told:
                if isinstance(said, Heard):
                    heard.append(said)
                else:
                    done.append(Choice(heard, said))
                    heard = []
        return done

    def stop_thinking(self, id_: str) -> bool:
        """End the reasoning of a job's reply; False: nothing of that id runs."""
        stream = self._by_id.get(id_)
        if stream is None or not stream.is_open:
            return False
        stream.stop_thinking()
        return True

    def close(self) -> None:
        """End what runs, and send away who waits."""
        self.slots.close()
        for stream in list(self._streams):
            stream.close()

    async def _open(self, job: Job, index: int) -> Stream:
        """A stream behind what was read before; what is kept gives way where memory is short."""
        prompt, options = job.prompts[index // job.n], _seeded(job.options, index)
        try:
            stream = await self._behind(self.prefixes.take(prompt), prompt, options)
        except MemoryLimitError:
            self.prefixes.clear()
            stream = await self._behind(self.prefixes.take(prompt), prompt, options)
        self._streams.add(stream)
        return stream

    async def _behind(self, prefix: Prefix, prompt: list[int], options: Options) -> Stream:
        lent = [prefix]  # a stream that has ended may be remembered, its arrays are not

        def ended(reply: Reply) -> None:
            self.metrics.replied(reply)
            # The next prompt of this conversation holds the answer, but no reasoning that led to no call.
            said = 0 if reply.thinking and not reply.tool_calls else len(reply.token_ids)
            self._keep(lent.pop(), len(prompt) + said)

        try:
            begin = partial(self.model.stream_ids, prompt, prefix=prefix, on_end=ended, **options)
            # A grammar, of a schema or of calls that have to be made, may take a while to compile.
            compiles = options.get("schema") or options.get("tools")
            return await asyncio.to_thread(begin) if compiles else begin()
        except MemoryLimitError:
            raise
        except MagistralError:  # a mistake in the request: what was taken is as it was
            self._keep(prefix, prefix.length)
            raise

    def _keep(self, prefix: Prefix, length: int) -> None:
        """For the prompts to come; on the model's thread, behind a step that may still be under way."""
        with suppress(ClosedError):
            self.model.submit(lambda: self.prefixes.put(prefix, length)).add_done_callback(_log)


def _log(kept: Future[None]) -> None:
    if isinstance(error := kept.exception(), Exception):
        failures.log(error)


def _seeded(options: Options, index: int) -> Options:
    """Each choice has its own seed, told by the first one's."""
    seed = options.get("seed")
    return options if seed is None else {**options, "seed": seed + index}
