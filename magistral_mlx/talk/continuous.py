"""Continuous batching: all replies that are under way take their steps in one pass of the model.

A turn on the model's thread reads a piece of one prompt and makes one step of every reply whose prompt is
read. Turns follow one another as long as somebody wants ids; what else is asked of the thread is done between
two of them. A reply is at most `LEAD` ids ahead of its reader: one that is read slowly sits out, and holds
nobody up. Whoever leaves is in no further turn. Does not know text, nor what a request is.
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
from magistral_mlx.wire import AS_BEFORE, Cost, Guide

from . import step
from .reply import ReplyBuilder
from .stream import OnStep
from .worker import Pending, Worker

LEAD = 4
PIECE = 256
"""Positions of a prompt that are read at once while others are being answered: enough for most of the speed,
and at Magistral's size half a second or so."""


class ContinuousBatch:
    """All replies of one model that are written together. Any thread may `join`.

    at_once: how many are under way; the others wait for one to end. By default whoever joins has seen to it.
    followed: replies are read as they grow. If not, all that counts is when the last has ended: they go on
        without a reader, and prompts are read one after another, so that more replies share a pass; what a
        prompt has in common with the one before it is not read again.
    """

    def __init__(self, worker: Worker, *, at_once: float = math.inf, followed: bool = True) -> None:
        self.lock = threading.RLock()
        self.lead = LEAD if followed else math.inf
        self._at_once = at_once
        self._followed = followed
        self._worker = worker
        self._members: list[Member] = []  # under way; whose prompt is to get a piece next comes first
        self._waiting = deque[Member]()
        self._turning = False

    def join(self, generation: Generation, builder: ReplyBuilder, *, needs: int = 0) -> "Member":
        """One reply more; nothing is computed until it is asked for ids.

        builder: of the reply. needs: bytes of its prompt's keys and values, if they are to be `owed`.
        """
        member = Member(self, generation, builder, needs)
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
    def owed(self) -> int:
        """Bytes that prompts will take which are not read yet."""
        with self.lock:
            return sum(member.owed for member in self._members)

    def wake(self) -> None:
        """Go on, if anybody wants ids. Under the lock."""
        if self._turning or not any(member.wants for member in self._members):
            return
        try:
            self._worker.submit(self._turn)
            self._turning = True
        except ClosedError as error:
            left = [*self._members, *self._waiting]
            self._members.clear()
            self._waiting.clear()
            for member in left:
                member.fail(error)

    def _admit(self) -> None:
        while self._waiting and len(self._members) < self._at_once:
            self._members.append(self._waiting.popleft())

    def _turn(self) -> None:
        with self.lock:
            here = [member for member in self._members if member.wants]
        reader = next((member for member in here if not member.row), None)
        if reader and self._followed:
            reader.read(PIECE if any(member.row for member in here) else None)
            with self.lock:
                self._members.sort(key=lambda member: member is reader)
        elif reader:
            reader.read(None)
            self._pass_on(reader)
        if self._followed or not reader:
            _step([member for member in here if member.row])
        with self.lock:
            self._turning = False
            self.wake()

    def _pass_on(self, reader: "Member") -> None:
        """What a prompt has read, as soon as it is read, to the one that is read next."""
        with self.lock:
            heir = next((other for other in chain(self._members, self._waiting) if not other.begun), None)
        if heir and reader.row:
            heir.follow(reader)


def _step(members: Sequence["Member"]) -> None:
    """One id of each, by one pass. An error of the pass is everybody's, one behind it is its row's alone."""
    start = time.perf_counter()
    mx.reset_peak_memory()
    if members:
        try:
            feed(members[0].model, [member.row for member in members if member.row])
        except Exception as error:  # noqa: BLE001 -- it is raised where the ids are asked for
            for member in members:
                member.fail(error)
    for member in members:
        member.take(start)


class Member:
    """One reply of the batch: the `Source` of its stream."""

    def __init__(
        self, batch: ContinuousBatch, generation: Generation, builder: ReplyBuilder, needs: int
    ) -> None:
        self.model = generation.model
        self.row: Row | None = None  # from when its prompt is read until it ends; the model's thread's own
        self._batch = batch
        self.generation = generation
        self._builder = builder
        self._needs = needs
        self._reading: Generator[None, object, Row] | None = None
        self._on_step: OnStep | None = None
        self._cost = Cost()  # since its last id was emitted
        self._pending: Pending[None] | None = None  # resolved by the next step
        self._ahead = 0  # steps that nobody has waited for
        self._ended = False
        self._error: Exception | None = None

    @property
    def wants(self) -> bool:
        """Whether it takes part in the next turn."""
        return self._on_step is not None and not self._ended and self._ahead < self._batch.lead

    @property
    def begun(self) -> bool:
        return self.row is not None or self._reading is not None

    @property
    def owed(self) -> int:
        return max(self._needs - self.generation.prefix.nbytes, 0)

    def reused(self) -> int:
        return self.generation.reused

    def passes(self) -> int | None:
        """One for each id."""

    def ask(self, on_step: OnStep) -> Pending[None]:
        """A step, if there was none since the last time; the stream has it before this is done."""
        with self._batch.lock:
            self._on_step, self._pending = on_step, Pending()
            pending = self._pending
            if self._ahead or self._ended:
                self._notify()
            self._batch.wake()
        return pending

    def leave(self) -> None:
        """No further id is wanted; whoever waits for one, in another thread, need not."""
        self._ended = True
        self._batch.leave(self)
        self._notify()

    def read(self, most: int | None) -> None:
        """A piece of the prompt, of at most so many ids."""
        try:
            if self._reading is None:
                self._reading, most = self.generation.row(most), None
            _, cost = step.take(self._reading, most)
            self._emit(None, cost)
        except StopIteration as read:
            self._reading, self.row = None, read.value
        except Exception as error:  # noqa: BLE001 -- it is raised where the ids are asked for
            self.fail(error)

    def follow(self, other: "Member") -> None:
        """Its prompt comes next: what both begin with is not read again."""
        try:
            self.generation.follow(other.generation)
        except Exception as error:  # noqa: BLE001 -- it is raised where the ids are asked for
            self.fail(error)

    def take(self, start: float) -> None:
        """The id of this step, begun at `start`."""
        if not self.row:
            return
        try:
            token, guide = self.row.take(self.model), None
            self._cost = self._cost.then(Cost(time.perf_counter() - start, mx.get_peak_memory()))
            if token is not None:
                cost, self._cost = self._cost, Cost()
                guide = self._emit(token, cost)
            if not self.row.go_on(None if self._ended else guide or AS_BEFORE):
                self.row = None
        except Exception as error:  # noqa: BLE001 -- it is raised where the ids are asked for
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """It ends; its arrays may be such whose evaluation failed."""
        self.row = self._reading = None
        self.generation.prefix.restart()
        self._error = error
        self.leave()

    def _emit(self, token: int | None, cost: Cost) -> Guide | None:
        """Hand a step to the stream, then tell whoever waits that it is there."""
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
        """Resolve what is waited for, or count a step that the next request will find."""
        with self._batch.lock:
            pending, self._pending = self._pending, None
            self._ahead = 0 if pending else self._ahead + 1
        if pending and self._error:
            pending.set_exception(self._error)
        elif pending:
            pending.set_result(None)
        if pending:
            pending.finish()
