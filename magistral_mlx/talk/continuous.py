"""Continuous batching: all replies that are under way take their steps in one pass of the model.

A turn on the model's thread reads a piece of one prompt and makes one step of every reply whose prompt is
read. Turns follow one another as long as somebody wants ids; what else is asked of the thread is done between
two of them. A reply is at most `LEAD` ids ahead of its reader: one that is read slowly sits out, and holds
nobody up. Whoever leaves is in no further turn. Does not know text, nor what a request is.
"""

import math
import threading
import time
from collections.abc import Generator, Sequence

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

    at_once: how many are under way; the others wait for one to end. None: whoever joins has seen to it.
    followed: replies are read as they grow. If not, all that counts is when the last has ended: they go on
        without a reader, and prompts are read in one go, so that more replies share a pass.
    """

    def __init__(self, worker: Worker, *, at_once: int | None = None, followed: bool = True) -> None:
        self.lock = threading.RLock()
        self.lead = LEAD if followed else math.inf
        self._at_once = at_once
        self._followed = followed
        self._worker = worker
        self._members: list[Member] = []  # whose prompt got a piece last comes last
        self._turning = False

    def join(
        self,
        generation: Generation,
        builder: ReplyBuilder,
        *,
        needs: int = 0,
        behind: "Member | None" = None,
    ) -> "Member":
        """One reply more; nothing is computed until it is asked for ids.

        builder: whom it is said to. needs: bytes of its prompt's keys and values, if they are to be `owed`.
        behind: one of this batch whose prompt is read first, and not again as far as both begin alike.
        """
        member = Member(self, generation, builder, needs, behind)
        with self.lock:
            self._members.append(member)
        return member

    def leave(self, member: "Member") -> None:
        with self.lock:
            self._members = [other for other in self._members if other is not member]

    @property
    def owed(self) -> int:
        """Bytes that prompts will take which are not read yet."""
        with self.lock:
            return sum(member.owed for member in self._members)

    def wake(self) -> None:
        """Somebody may want ids. Under the lock."""
        if not self._turning:
            self._worker.submit(self._turn)
            self._turning = True

    def _turn(self) -> None:
        with self.lock:
            here = [member for member in self._members if member.wants]
        here = sorted(here, key=lambda member: not member.begun)[: self._at_once]
        reader = next((member for member in here if not member.row), None)
        if reader:
            reader.read(PIECE if self._followed and any(member.row for member in here) else None)
        if self._followed or not reader:
            _step([member for member in here if member.row])
        with self.lock:
            self._members.sort(key=lambda member: member is reader)
            self._turning = False
            if any(member.wants for member in self._members):
                try:
                    self.wake()
                except ClosedError as error:
                    for member in [*self._members]:
                        member.fail(error)


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
        self,
        batch: ContinuousBatch,
        generation: Generation,
        builder: ReplyBuilder,
        needs: int,
        behind: "Member | None",
    ) -> None:
        self.model = generation.model
        self.row: Row | None = None  # from when its prompt is read until it ends; the model's thread's own
        self._batch = batch
        self.generation = generation
        self._builder = builder
        self._needs = needs
        self._behind = behind  # until its own prompt's turn
        self._reading: Generator[None, object, Row] | None = None
        self._on_step: OnStep | None = None
        self._cost = Cost()  # since the last id that was told
        self._pending: Pending[None] | None = None  # whom the next step is told
        self._ahead = 0  # steps that nobody has waited for
        self._ended = False
        self._error: Exception | None = None

    @property
    def wants(self) -> bool:
        """Whether it takes part in the next turn."""
        asked = self._on_step is not None and not self._ended and self._ahead < self._batch.lead
        return asked and not (self._behind and self._behind.unread)

    @property
    def begun(self) -> bool:
        return self.row is not None or self._reading is not None

    @property
    def unread(self) -> bool:
        return self.row is None and not self._ended

    @property
    def owed(self) -> int:
        return max(self._needs - self.generation.prefix.nbytes, 0)

    def reused(self) -> int:
        return self.generation.reused

    def passes(self) -> int | None:
        """One for each id."""

    def ask(self, on_step: OnStep) -> Pending[None]:
        """A step, if there was none since the last time; each is said before anybody is told of it."""
        with self._batch.lock:
            if not self._ended:
                self._batch.wake()
            self._on_step, self._pending = on_step, Pending()
            pending = self._pending
            if self._ahead or self._ended:
                self._notify()
        return pending

    def leave(self) -> None:
        """No further id is wanted."""
        self._ended = True
        self._batch.leave(self)

    def read(self, most: int | None) -> None:
        """A piece of the prompt, of at most so many ids."""
        try:
            if self._behind:
                self.generation.follow(self._behind.generation)
                self._behind = None
            if self._reading is None:
                self._reading, most = self.generation.row(most), None
            _, cost = step.take(self._reading, most)
            self._emit(None, cost)
        except StopIteration as read:
            self._reading, self.row = None, read.value
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
        self._notify()

    def _emit(self, token: int | None, cost: Cost) -> Guide | None:
        """OnStep a step, then tell that it is there."""
        assert self._on_step
        guide = self._on_step(token, cost)
        if token is not None:
            self.generation.prefix.ids += [token, *(guide.said if guide else ())]
        if self._builder.finish_reason:
            self.leave()
        self._notify()
        return guide

    def _notify(self) -> None:
        """Whoever waits, or whoever asks next."""
        with self._batch.lock:
            pending, self._pending = self._pending, None
            self._ahead = 0 if pending else self._ahead + 1
        if pending and self._error:
            pending.set_exception(self._error)
        elif pending:
            pending.set_result(None)
        if pending:
            pending.finish()
