"""Several replies written at once: steps of all are taken on the model's thread until the last has ended.

Knows which replies still go on, and passes on what each is to say. Does not know text or arrays; other
streams of the model take turns with it, step by step.
"""

import asyncio
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from magistral_mlx.decoder.batch import Drawn, Told
from magistral_mlx.wire import Cost, Guide

from . import step
from .reply import Reply, Telling
from .worker import Pending, Worker

_Step: TypeAlias = tuple[Drawn | None, Cost]
"""Ids by the number of their reply (None: a piece of a prompt was read), and what they cost."""


@dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Where a batch's ids come from."""

    worker: Worker
    steps: Generator[Drawn | None, Told | None, None]
    reused: Sequence[int]
    """How many ids of each reply's prompt were read before; there when the first ids are."""


class Batch:
    """Runs once, by `drain` or `adrain`. Whatever ends it early frees the model."""

    def __init__(self, source: BatchSource, tellings: Sequence[Telling]) -> None:
        self._source: BatchSource | None = source
        self._tellings = tellings
        self._told: dict[int, Guide | None] = {}
        self._reading = Cost()  # of all prompts: each reply waits for them
        self._waited = [Cost()] * len(tellings)  # since a reply's last own id

    def drain(self) -> list[Reply]:
        """Run to the end of all replies, and return them."""
        try:
            while asked := self._ask():
                self._take(*asked.wait())
        finally:
            self._source = None
        return [telling.reply for telling in self._tellings]

    async def adrain(self) -> list[Reply]:
        """`drain`, for `await`."""
        try:
            while asked := self._ask():
                self._take(*await asyncio.wrap_future(asked))
        finally:
            self._source = None
        return [telling.reply for telling in self._tellings]

    def _ask(self) -> "Pending[_Step] | None":
        if self._source is None or all(telling.reason for telling in self._tellings):
            return None
        steps, told, self._told = self._source.steps, self._told, {}
        return self._source.worker.submit(lambda: step.take(steps, told or None))

    def _take(self, drawn: Drawn | None, cost: Cost) -> None:
        """Account for one step."""
        if drawn is None:
            self._reading = self._reading.then(cost)
            return
        self._read()
        for number, telling in enumerate(self._tellings):
            self._waited[number] = self._waited[number].then(cost)
            if number in drawn:
                guide = telling.say(drawn[number], self._waited[number])
                self._waited[number] = Cost()
                telling.events.clear()  # nobody follows them one by one
                if telling.reason or guide:
                    self._told[number] = None if telling.reason else guide

    def _read(self) -> None:
        """All prompts are read."""
        if self._reading.seconds and self._source:
            for number, telling in enumerate(self._tellings):
                telling.read(self._source.reused[number], self._reading)
            self._reading = Cost()
