"""Runs a job and sends its reply, whole or streamed, to a client that may disconnect at any time.

Knows slots, the service and HTTP. Does not know what was requested, or the format of a reply
(`ReplyEncoder`).
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from magistral_mlx.talk.stream import Stream

from . import failures
from .failures import GONE, RefusedError
from .replies import ChoiceEnd, ReplyEncoder
from .service import Job, Service
from .slots import Slot

T = TypeVar("T")


async def answer(
    service: Service, request: Request, job: Job, encoder: ReplyEncoder, *, stream: bool
) -> Response:
    """Wait for a slot, then answer with the whole reply or a stream."""
    slot = await _while_connected(request, service.slots.take())
    if stream:
        try:
            first = await _while_connected(request, service.begin(job))
        except BaseException:
            slot.release()
            raise
        return _Events(_pieces(service, job, first, encoder), slot, first)
    with slot:
        choices = await _while_connected(request, service.choices(job))
    return Response(encoder.whole(choices), media_type="application/json")


async def _pieces(service: Service, job: Job, first: Stream, encoder: ReplyEncoder) -> AsyncGenerator[bytes]:
    """A job as server-sent events. An error becomes an event, too."""
    ends: dict[int, ChoiceEnd] = {}
    try:
        for index in range(job.choices):
            yield encoder.opening(index)
        async with aclosing(service.run(job, first)) as events:
            async for index, event in events:
                if not isinstance(event, ChoiceEnd):
                    yield encoder.piece(index, event)
                    continue
                ends[index] = event
                yield encoder.ending(index, event)
        yield encoder.last([ends[index] for index in range(job.choices)])
    except Exception as error:  # noqa: BLE001 -- the status has been sent: only an event can report it
        failures.log(error)
        yield encoder.failed(error)


class _Events(EventSourceResponse):
    """An event stream that holds its slot until the last event is sent, or the client disconnects."""

    def __init__(self, pieces: AsyncGenerator[bytes], slot: Slot, first: Stream) -> None:
        super().__init__(pieces)
        self._slot, self._first = slot, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._slot, self._first:
            await super().__call__(scope, receive, send)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; if the client disconnects first, cancel it and raise."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RefusedError(GONE, "the client has disconnected")
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
