"""Continuous batching: all active replies take their steps in one forward pass of the model.

An iteration on the model's thread prefills a piece of one prompt and decodes one step of every reply whose
prompt is complete. Iterations follow one another as long as any reply's consumer wants ids; other jobs of the
thread run between two of them. A reply is at most `MAX_AHEAD` steps ahead of its consumer: with a slow
consumer it skips iterations, and delays no other reply. One that leaves takes part in no further iteration.
Does not know text, nor what a request is.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from itertools import chain

import mlx.core as mx

from magistral_mlx.decoder.batch import Row, feed
from magistral_mlx.decoder.generation import Generation
from magistral_mlx.errors import ClosedError
from magistral_mlx.wire import UNCHANGED, Cost, Guide

from . import step
from .reply import ReplyBuilder
from .stream import OnStep
from .worker import Pending, Worker

MAX_AHEAD = 4
"""Steps that a reply may be ahead of its consumer."""
PREFILL_PIECE = 256
"""Prompt positions prefilled per iteration while other replies are decoded: enough for most of the speed, and
at Magistral's size half a second or so."""


class ContinuousBatch:
    """All replies of one model that are decoded together. `join` from any thread.

    at_once: how many are active; the others wait for one to end. Unlimited by default: the caller decides.
    streaming: replies have consumers that read them as they grow. If False, only the total time counts: they
        advance without a consumer, and prompts are prefilled one after another before the next decoding step,
        so that more replies share a pass; a prefix shared with the prompt before is not prefilled again.
    """

    def __init__(self, worker: Worker, *, at_once: float = math.inf, streaming: bool = True) -> None:
        self.lock = threading.RLock()
        self.max_ahead = MAX_AHEAD if streaming else math.inf
        self._at_once = at_once
        self._streaming = streaming
        self._worker = worker
        self._members: list[Member] = []  # active, in the order in which their prompts get the next piece
        self._waiting = deque[Member]()
        self._scheduled = False

    def join(self, generation: Generation, builder: ReplyBuilder, *, kv_bytes: int = 0) -> "Member":
        """Add a reply; nothing is computed until its first step is requested.

        builder: of the reply. kv_bytes: of its prompt's KV cache, if they are to be counted in `unallocated`.
        """
        member = Member(self, generation, builder, kv_bytes)
        with self.lock:
            self._waiting.append(member)
            self._admit()
        return member

    def leave(self, member: "Member") -> None:
        with self.lock:
            if member in self._members:
                self._members.remove(member)
            elif member in self._waiting:
                self._waiting.remove(member)
            self._admit()
            self.wake()

    @property
    def unallocated(self) -> int:
        """Bytes of KV cache that active prompts have still to allocate."""
        with self.lock:
            return sum(member.unallocated for member in self._members)

    def wake(self) -> None:
        """Schedule an iteration, if any reply takes part. Call with the lock held."""
        if self._scheduled or not any(member.runnable for member in self._members):
            return
        try:
            self._worker.submit(self._iterate)
            self._scheduled = True
        except ClosedError as error:
            left = [*self._members, *self._waiting]
            self._members.clear()
            self._waiting.clear()
            for member in left:
                member.fail(error)

    def _admit(self) -> None:
        while self._waiting and len(self._members) < self._at_once:
            self._members.append(self._waiting.popleft())

    def _iterate(self) -> None:
        with self.lock:
            runnable = [member for member in self._members if member.runnable]
        prefilling = next((member for member in runnable if not member.row), None)
        if prefilling and self._streaming:
            prefilling.prefill(PREFILL_PIECE if any(member.row for member in runnable) else None)
            with self.lock:
                self._members.sort(key=lambda member: member is prefilling)
        elif prefilling:
            prefilling.prefill(None)
            self._share_prefix(prefilling)
        if self._streaming or not prefilling:
            _step([member for member in runnable if member.row])
        with self.lock:
            self._scheduled = False
            self.wake()

    def _share_prefix(self, prefilled: "Member") -> None:
        """Once a prompt is prefilled, share its prefix with the reply whose prompt comes next."""
        with self.lock:
            members = chain(self._members, self._waiting)
            following = next((member for member in members if not member.started), None)
        if following and prefilled.row:
            following.reuse_prefix(prefilled)


def _step(members: Sequence["Member"]) -> None:
    """One step of each, in one forward pass. An error of the pass fails all, a later one its member only."""
    start = time.perf_counter()
    mx.reset_peak_memory()
    if members:
        try:
            feed(members[0].model, [member.row for member in members if member.row])
        except Exception as error:  # noqa: BLE001 -- raised again to the reply's consumer
            for member in members:
                member.fail(error)
    for member in members:
        member.take(start)


class Member:
    """One reply of the batch: the `Source` of its stream."""

    def __init__(
        self, batch: ContinuousBatch, generation: Generation, builder: ReplyBuilder, kv_bytes: int
    ) -> None:
        self.model = generation.model
        self.row: Row | None = None  # from the end of prefill to the end of the reply; model's thread only
        self._batch = batch
        self.generation = generation
        self._builder = builder
        self._kv_bytes = kv_bytes
        self._prefilling: Generator[None, object, Row] | None = None
        self._on_step: OnStep | None = None
        self._cost = Cost()  # since the last id was emitted
        self._pending: Pending[None] | None = None  # a request that the next step resolves
        self._ahead = 0  # steps taken since the last request was resolved
        self._ended = False
        self._error: Exception | None = None

    @property
    def runnable(self) -> bool:
        """Whether it takes part in the next iteration."""
        return self._on_step is not None and not self._ended and self._ahead < self._batch.max_ahead

    @property
    def started(self) -> bool:
        return self.row is not None or self._prefilling is not None

    @property
    def unallocated(self) -> int:
        return max(self._kv_bytes - self.generation.prefix.nbytes, 0)

    def reused(self) -> int:
        return self.generation.reused

    def passes(self) -> int | None:
        """None: one for each id."""

    def request_step(self, on_step: OnStep) -> Pending[None]:
        """Request a step; resolved at once if any was taken since the last request.

        The stream has received the step before this is resolved.
        """
        with self._batch.lock:
            self._on_step, self._pending = on_step, Pending()
            pending = self._pending
            if self._ahead or self._ended:
                self._notify()
            self._batch.wake()
        return pending

    def leave(self) -> None:
        """Leave the batch. Another thread that waits for a step is woken."""
        self._ended = True
        self._batch.leave(self)
        self._notify()

    def prefill(self, most: int | None) -> None:
        """Prefill the next piece of the prompt, of at most `most` ids."""
        try:
            if self._prefilling is None:
                self._prefilling, most = self.generation.row(most), None
            _, cost = step.take(self._prefilling, most)
            self._emit(None, cost)
        except StopIteration as read:
            self._prefilling, self.row = None, read.value
        except Exception as error:  # noqa: BLE001 -- raised again to the reply's consumer
            self.fail(error)

    def reuse_prefix(self, other: "Member") -> None:
        """Reuse the prefix that this prompt shares with that of `other`, which was just prefilled."""
        try:
            self.generation.reuse_prefix(other.generation)
        except Exception as error:  # noqa: BLE001 -- raised again to the reply's consumer
            self.fail(error)

    def take(self, start: float) -> None:
        """Hand out the id of this step. start: `time.perf_counter()` at its beginning."""
        if not self.row:
            return
        try:
            token, guide = self.row.read(self.model), None
            self._cost = self._cost.then(Cost(time.perf_counter() - start, mx.get_peak_memory()))
            if token is not None:
                cost, self._cost = self._cost, Cost()
                guide = self._emit(token, cost)
            if not self.row.advance(None if self._ended else guide or UNCHANGED):
                self.row = None
        except Exception as error:  # noqa: BLE001 -- raised again to the reply's consumer
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End this reply by an error. Its caches are emptied: arrays that failed to evaluate would again."""
        self.row = self._prefilling = None
        self.generation.prefix.restart()
        self._error = error
        self.leave()

    def _emit(self, token: int | None, cost: Cost) -> Guide | None:
        """Pass a step to the stream, then wake its consumer."""
        assert self._on_step
        guide = self._on_step(token, cost)
        if token is not None:
            self.generation.prefix.ids += [token, *(guide.forced if guide else ())]
        if self._builder.finish_reason:
            self.leave()
        else:
            self._notify()
        return guide

    def _notify(self) -> None:
        """Resolve the pending request, or count a step for the next one."""
        with self._batch.lock:
            pending, self._pending = self._pending, None
            self._ahead = 0 if pending else self._ahead + 1
        if pending and self._error:
            pending.set_exception(self._error)
        elif pending:
            pending.set_result(None)
        if pending:
            pending.finish()
