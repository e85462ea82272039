"""One client's line: closed when it is silent where it should speak, or takes nothing of what it asked for.

uvicorn gives up a line only where nothing comes *between* requests: one that never says anything, sends its
headers byte by byte, or reads no answer is kept for ever; a process has a few hundred to give. Bodies that
come too slowly are `safety`'s to refuse.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """head_seconds: in which a request's headers have to come, all of them.

    send_seconds: in which some of what waits to be sent has to be taken.
    """

    head_seconds = 10.0
    send_seconds = 60.0
    _head: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = self.loop.call_later(self.head_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete:  # a request is being answered
            self._head = _cancelled(self._head)
        elif self._head is None:  # the next one begins, or what is left of a body that nobody read
            self._head = self.loop.call_later(self.head_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self.loop.call_later(self.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._sending = _cancelled(self._sending)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._sending = _cancelled(self._head), _cancelled(self._sending)
        super().connection_lost(exc)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
