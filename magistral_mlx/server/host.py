"""The listening socket, uvicorn on it, and graceful shutdown.

Knows uvicorn and signals. Does not know what is served (`app`).
"""

import errno
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.types import ASGIApp

from magistral_mlx.errors import ServerError

from .connection import Connection

_REMEDIES = {
    errno.EADDRINUSE: "choose another --port, or end the program that uses it",
    errno.EACCES: "choose a --port above 1023",
}
_OTHER_HOST = "--host is an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them"

GRACE_SECONDS = 5
"""Time for connections to close by themselves at shutdown, after all replies were stopped."""


class Host(uvicorn.Server):
    """Serves until `should_exit`, Ctrl-C or SIGTERM; `run` then returns.

    A second Ctrl-C does not wait for connections to close.
    """

    def __init__(
        self, app: ASGIApp, *, close: Callable[[], None], connection: type[Connection] = Connection
    ) -> None:
        AppStatus.disable_automatic_graceful_drain()  # `close` ends the streams, which tell their clients
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self._close = close

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 -- uvicorn's signature
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._close()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any free port.

    Raises:
        ServerError: the address is in use, not permitted, or not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        remedy = _REMEDIES.get(error.errno or 0, _OTHER_HOST)
        raise ServerError(f"cannot listen on {host}:{port} ({error}); {remedy}") from error
    bound.listen(128)
    return bound
