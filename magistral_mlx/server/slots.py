"""Admission control: a limit of running and one of waiting requests; all others are told when to retry.

Knows asyncio. Does not know what a slot is used for. Everything runs on one event loop.
"""

import asyncio
import math
import time
from collections import deque
from typing import Self


class FullError(Exception):
    """All slots are taken and the queue is full. `retry_after`: seconds after which there may be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy and its queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class ClosingError(Exception):
    """The server is shutting down: no further request may run."""


class Slots:
    """At most `running` slots are taken at once, in order of arrival; at most `waiting` requests queue."""

    def __init__(self, *, running: int, waiting: int) -> None:
        self._most_running, self._most_waiting = running, waiting
        self._queue: deque[asyncio.Future[None]] = deque()
        self._seconds = 1.0  # how long a slot is held: a moving average
        self._closed = False
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def take(self) -> "Slot":
        """Wait for a slot.

        Raises:
            FullError: the queue is full.
            ClosingError: `close` was called, before or while waiting.
        """
        self.check()
        if self.running < self._most_running:
            self.running += 1
            return Slot(self)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.exception() is None:  # got a slot just as the wait was cancelled
                self._pass_on()
            raise
        finally:
            if turn in self._queue:
                self._queue.remove(turn)
        return Slot(self)

    def check(self) -> None:
        """Raise what `take` would raise at once: spares the work on a request that would be refused."""
        if self._closed:
            raise ClosingError("the server is shutting down")
        if self.running >= self._most_running and len(self._queue) >= self._most_waiting:
            turns = (len(self._queue) + 1) / self._most_running
            raise FullError(min(math.ceil(self._seconds * turns), 600))

    def close(self) -> None:
        """Refuse all waiting requests; running ones may finish."""
        self._closed = True
        for turn in self._queue:
            if not turn.done():
                turn.set_exception(ClosingError("the server is shutting down"))

    def give_back(self, seconds: float) -> None:
        """Release a slot that was held for `seconds`."""
        self._seconds += (seconds - self._seconds) / 8
        self._pass_on()

    def _pass_on(self) -> None:
        """Pass the slot to the request that has waited longest, or free it."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1


class Slot:
    """The right to run. Only the first `release` counts."""

    def __init__(self, slots: Slots) -> None:
        self._slots: Slots | None = slots
        self._since = time.monotonic()

    def release(self) -> None:
        if self._slots is not None:
            slots, self._slots = self._slots, None
            slots.give_back(time.monotonic() - self._since)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
