"""One client connection: closed when a request's headers are late, or the response is not read.

uvicorn only times out *between* requests: a client that never sends anything, sends its headers byte by byte,
or reads no response would keep its connection for ever, and a process has only a few hundred. Slow bodies are
refused by `safety`.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """head_seconds: time for all headers of a request to arrive.

    send_seconds: once the send buffer is full, time for the client to read enough of it.
    """

    head_seconds = 10.0
    send_seconds = 60.0
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.head_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete:  # a request is being answered
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None:  # the next request, or the rest of a body that was not read
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._send_timer = _cancelled(self._send_timer)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer, self._send_timer = _cancelled(self._head_timer), _cancelled(self._send_timer)
        super().connection_lost(exc)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
