"""One reply as it is generated: `Stream` yields its events, to `for` or to `async for`.

Receives steps made on the model's thread: an id, or None for a prefilled piece of the prompt; a `Guide` in
return says how the reply continues. Does not know what ids mean, or when a reply has ended (`ReplyBuilder`).
"""

import asyncio
import threading
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Protocol, Self, TypeAlias

from magistral_mlx.events import Event
from magistral_mlx.text.thinking import Phase
from magistral_mlx.wire import Cost, Guide, TokenLogprob

from . import step
from .reply import Reply, ReplyBuilder
from .worker import Pending, Worker

OnStep: TypeAlias = Callable[[int | None, Cost], Guide | None]
"""An id (None: a piece of the prompt was prefilled) and its cost → how the reply continues."""


class Source(Protocol):
    """Where a stream's ids come from."""

    def request_step(self, on_step: OnStep) -> Pending[None]:
        """Request a step; `on_step` gets it on the model's thread, which Ctrl-C does not interrupt."""
        ...

    def leave(self) -> None:
        """No more steps are wanted."""
        ...

    def reused(self) -> int:
        """How many ids of the prompt were in the KV cache before; known at the first step."""
        ...

    def passes(self) -> int | None:
        """How many forward passes the ids so far took; None: one each."""
        ...


class OnDemand:
    """Steps of one generator, each run when it is requested: streams that are open together take turns."""

    def __init__(
        self,
        worker: Worker,
        steps: Generator[int | None, Guide | None, None],
        *,
        reused: Callable[[], int],
        passes: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._worker = worker
        self._steps = steps
        self._guide: Guide | None = None  # for the next step
        self.reused = reused
        self.passes = passes

    def request_step(self, on_step: OnStep) -> Pending[None]:
        return self._worker.submit(partial(self._step, on_step))

    def leave(self) -> None:
        """Nothing to do: steps run on request only."""

    def _step(self, on_step: OnStep) -> None:
        self._guide = on_step(*step.take(self._steps, self._guide))


class Stream:
    """An iterator of `ThinkToken`, `AnswerToken` and, at its end, `Finished`; a context manager; a `reply`.

    Outside a batch, the model takes a step only when the next event is requested. Leaving the `with`,
    `close`, or cancelling the task that waits stops it at once; the model is free for the next stream.
    Iterate from one thread or task; `close` from any.
    """

    def __init__(
        self,
        source: Source,
        builder: ReplyBuilder,
        *,
        on_end: Callable[[Reply], None] = lambda _: None,
        whole: bool = False,
    ) -> None:
        """on_end: called once, with the reply. whole: only `reply` is wanted, and no events are kept."""
        self._source: Source | None = source
        self._builder = builder
        self._events = builder.events
        self._on_end = on_end
        self._whole = whole
        self._pending: Pending[None] | None = None
        self._lock = threading.RLock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while not self._events and (pending := self._request_step()):
            self._receive(pending)
        if not self._events:
            raise StopIteration
        return self._events.popleft()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events and (pending := self._request_step()):
            waiting = asyncio.wrap_future(pending)
            waiting.add_done_callback(_retrieve)
            try:
                await asyncio.wait([waiting])
            except asyncio.CancelledError:
                self.close()
                raise
            self._receive(pending)
        if not self._events:
            raise StopAsyncIteration
        return self._events.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _ipython_display_(self) -> None:
        """As the value of a notebook's cell, a stream runs and shows itself."""
        from .notebook import show  # noqa: PLC0415 -- used in notebooks only

        with self:
            show(self)

    def start(self) -> None:
        """Request the first step now, not when the first event is requested."""
        self._request_step()

    def close(self) -> None:
        """Stop now. What there is so far stays in `reply`; nothing more is yielded."""
        self._end(silently=True)

    def drain(self) -> Reply:
        """Run to the end and return the whole reply."""
        with self:
            for _ in self:
                pass
        return self.reply

    async def adrain(self) -> Reply:
        """`drain`, for `await`."""
        async with self:
            async for _ in self:
                pass
        return self.reply

    def stop_thinking(self) -> None:
        """End the reasoning at the next line or sentence and go on to the answer. From any thread."""
        self._builder.stop_thinking()

    @property
    def is_open(self) -> bool:
        """Whether more events may come."""
        return self._source is not None

    @property
    def phase(self) -> Phase:
        """Where the reply stands: still thinking, or answering."""
        return self._builder.phase

    @property
    def reply(self) -> Reply:
        """The reply so far; the whole one once the stream has ended."""
        return self._builder.reply

    @property
    def logprobs(self) -> Sequence[TokenLogprob | None]:
        """If requested, one for each id so far, in the order of the events' ids."""
        return self._builder.logprobs

    def _request_step(self) -> Pending[None] | None:
        """The pending step, or a new one; None: the stream has ended."""
        if self._builder.finish_reason is not None:
            self._end()
        with self._lock:
            if self._source is not None and (self._pending is None or _succeeded(self._pending)):
                self._pending = self._source.request_step(self._on_step)
            return self._pending

    def _on_step(self, token: int | None, cost: Cost) -> Guide | None:
        """Record one step, before its waiter is woken: however a wait is interrupted, no id is lost."""
        with self._lock:
            if self._source is None:  # closed while the step ran
                return None
            if token is None:
                self._builder.prefilled(self._source.reused(), cost)
                return None
            guide = self._builder.add(token, cost, self._source.passes())
        if self._whole:
            self._events.clear()
            if self._builder.finish_reason:  # free its memory now, not when the caller comes for the reply
                self._end()
        return guide

    def _receive(self, pending: Pending[None]) -> None:
        """Wait for the step, if it is not done yet."""
        try:
            pending.wait()
        except Exception:  # the step's own; KeyboardInterrupt, of the wait, is not one
            self.close()
            raise
        if self._builder.finish_reason is not None:
            self._end()

    def _end(self, *, silently: bool = False) -> None:
        """Release the model and call `on_end`, once. silently: drop events that were not yielded yet."""
        with self._lock:
            if self._source is None:
                return
            self._source.leave()  # first: a Ctrl-C after it leaves nothing running
            self._source = self._pending = None
            if silently:
                self._events.clear()
        self._on_end(self.reply)  # not under the lock: the callback may wait for the model's thread


def _succeeded(done: Pending[None]) -> bool:
    """Whether a step has finished without an error. A failed one is kept: the next request raises it too."""
    return done.finished and done.exception() is None


def _retrieve(waiting: "asyncio.Future[None]") -> None:
    """Mark an error as seen, so that asyncio does not log it as lost: `_receive` raises it."""
    if not waiting.cancelled():
        waiting.exception()
