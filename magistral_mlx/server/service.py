"""The model behind the routes: replies that take turns, and share what was read.

Knows the library. Does not know HTTP, nor the shape of an answer.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakSet

from magistral_mlx.chat import Magistral
from magistral_mlx.errors import ClosedError, MagistralError, MemoryLimitError
from magistral_mlx.events import Finished, FinishReason
from magistral_mlx.options import Options
from magistral_mlx.prefix import Prefix
from magistral_mlx.reply import Reply
from magistral_mlx.stream import Stream

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

    async def run(self, job: Job) -> AsyncGenerator[Said]:
        """All choices of a job; each takes one step of the model at a time, so those of others go on too."""
        for index, prompt in enumerate(prompt for prompt in job.prompts for _ in range(job.n)):
            voice = job.voice()
            reason: FinishReason | None = None
            async with self._open(prompt, _seeded(job.options, index)) as stream:
                async for event in stream:
                    if any(heard := voice.hear(event)):
                        yield index, heard
                    if isinstance(event, Finished):
                        reason = event.reason
                    elif voice.stopped:
                        reason = "stop"
                        break
            if reason is None:  # closed by `close`
                raise ClosingError
            yield index, Ended(reason, stream.reply.stats, stream.reply.tool_calls)

    async def choices(self, job: Job) -> list[Choice]:
        """The same, waited for."""
        heard: list[Heard] = []
        done: list[Choice] = []
        async with aclosing(self.run(job)) as told:
            async for _, said in told:
                if isinstance(said, Heard):
                    heard.append(said)
                else:
                    done.append(Choice(heard, said))
                    heard = []
        return done

    def close(self) -> None:
        """End what runs, and send away who waits."""
        self.slots.close()
        for stream in list(self._streams):
            stream.close()

    def _open(self, prompt: list[int], options: Options) -> Stream:
        """A stream behind what was read before; what is kept gives way where memory is short."""
        try:
            stream = self._behind(self.prefixes.take(prompt), prompt, options)
        except MemoryLimitError:
            self.prefixes.clear()
            stream = self._behind(self.prefixes.take(prompt), prompt, options)
        self._streams.add(stream)
        return stream

    def _behind(self, prefix: Prefix, prompt: list[int], options: Options) -> Stream:
        def ended(reply: Reply) -> None:
            self.metrics.replied(reply)
            # The next prompt of this conversation will hold the answer, but not the reasoning before it.
            said = 0 if reply.thinking else len(reply.token_ids)
            with suppress(ClosedError):
                self.model.submit(lambda: self.prefixes.put(prefix, len(prompt) + said))

        try:
            return self.model.stream_ids(prompt, prefix=prefix, on_end=ended, **options)
        except MemoryLimitError:
            raise
        except MagistralError:  # a mistake in the request: what was taken is as it was
            self.model.submit(lambda: self.prefixes.put(prefix, prefix.length))
            raise


def _seeded(options: Options, index: int) -> Options:
    """Each choice has its own seed, told by the first one's."""
    seed = options.get("seed")
    return options if seed is None else {**options, "seed": seed + index}
