"""Access control, before everything else: Host, Origin, API key, size and time of a request.

A page on the web can make a browser send requests to this machine. It cannot choose their `Host` (but can
have its own name point here: DNS rebinding) nor their `Origin`; so both must be known ones. A key keeps other
people out, limits of size and time keep any one request small. Knows ASGI and headers. Does not know what is
requested.
"""

import asyncio
import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import failures
from .failures import RefusedError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN_PATHS = frozenset({"/", "/health"})
OPEN_FILES = "/page/"
"""What needs no key: the page, which asks for the key, and the health check."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which requests are accepted.

    hosts: values of `Host` that are accepted. any_address: any IP address, too (a name can be made to point
        here by DNS, an address cannot).
    origins: other sites whose pages may send requests.
    body_bytes, body_seconds: the largest size of a body, and the longest time for it to arrive.
    """

    key: str | None = None
    hosts: frozenset[str] = LOOPBACK
    any_address: bool = False
    origins: frozenset[str] = frozenset()
    body_bytes: int = 8 * 2**20
    body_seconds: float = 30.0


class Safety:
    """ASGI middleware that refuses requests against the rules."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        began = False

        async def sending(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _replayed(body, receive), sending)
        except Exception as error:  # noqa: BLE001 -- the outermost handler: no client gets a traceback
            failures.log(error)
            if not began:
                await failures.refusal(error).response(scope["path"])(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if not self._knows(_name(host)):
            raise RefusedError(
                403,
                "this server does not answer to that Host; serve --allow-host adds one",
                code="foreign_host",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin not in self._rules.origins and not _same(origin, host):
            raise RefusedError(
                403,
                "requests from other sites' pages are refused; serve --allow-origin allows one",
                code="foreign_origin",
            )
        unlocked = scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FILES)
        if self._rules.key is None or unlocked or scope["method"] == "OPTIONS":
            return
        kind, _, token = headers.get(b"authorization", "").partition(" ")
        given = [token.strip() if kind.lower() == "bearer" else "", headers.get(b"x-api-key", "")]
        if not any(hmac.compare_digest(one.encode(), self._rules.key.encode()) for one in given):
            wanted = {"WWW-Authenticate": "Bearer"}
            message = "expected this server's key, as `Authorization: Bearer …`"
            raise RefusedError(401, message, code="invalid_api_key", headers=wanted)

    def _knows(self, name: str) -> bool:
        return name in self._rules.hosts or (self._rules.any_address and _is_address(name))

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, for methods that have one."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        try:
            async with asyncio.timeout(self._rules.body_seconds):
                return await self._read(receive)
        except TimeoutError:
            message = f"the body did not come within {self._rules.body_seconds:g} s"
            raise RefusedError(408, message, headers={"Connection": "close"}) from None

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(failures.GONE, "the client has disconnected")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._rules.body_bytes:
                message = f"a request has at most {self._rules.body_bytes} bytes"
                raise RefusedError(413, message, headers={"Connection": "close"})
            more = message.get("more_body", False)
        return b"".join(parts)


def _replayed(body: bytes | None, receive: Receive) -> Receive:
    """`receive` that first returns the body, which was read already."""
    waiting = [body] if body is not None else []

    async def receiving() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return receiving


def _name(host: str) -> str:
    """`localhost:8000` → `localhost`, `[::1]:8000` → `::1`."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same(origin: str, host: str) -> bool:
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and place.lower() == host.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
