"""Errors in the formats that clients expect: OpenAI's, and under `/v1/messages` Anthropic's.

Knows the status of each error of the library. Messages written here do not quote the request, and all are cut
to `MAX_MESSAGE` characters: a request may be long, private, or invalid Unicode.
"""

import json
import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, cast

from starlette.responses import Response

from magistral_mlx.errors import ClosedError, ContextError, MagistralError, MemoryLimitError

from .slots import ClosingError, FullError

logger = logging.getLogger(__name__)


MAX_MESSAGE = 1000
"""Characters of an error message: the library's may quote a request, which may be a book."""


class RefusedError(Exception):
    """Refuses a request: the error that the client gets."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}…")
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    @property
    def as_anthropic(self) -> bytes:
        kind = _ANTHROPIC_KINDS.get(self.status) or _KINDS.get(self.status)
        kind = kind or ("api_error" if self.status >= 500 else "invalid_request_error")
        return json.dumps({"type": "error", "error": {"type": kind, "message": str(self)}}).encode()

    def response(self, path: str) -> Response:
        """The HTTP response, in the format of the API that `path` belongs to."""
        body = self.as_anthropic if path.startswith(ANTHROPIC) else self.body
        return Response(body, self.status, self.headers, media_type="application/json")


ANTHROPIC = "/v1/messages"
"""Beginning of the paths of Anthropic's API."""

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_ANTHROPIC_KINDS = {408: "timeout_error", 413: "request_too_large", 503: "overloaded_error"}

GONE = 499
"""Status of a request whose client has disconnected; nobody receives it, but the metrics may count it."""


def unsupported(param: str, message: str) -> RefusedError:
    """A part of the API that this server does not implement."""
    return RefusedError(400, message, param=param, code="unsupported")


def refusal(error: Exception) -> RefusedError:
    """What the client gets for any exception."""
    match error:
        case RefusedError():
            refused = error
        case FullError():
            wait = {"Retry-After": str(error.retry_after)}
            refused = RefusedError(429, str(error), code="queue_full", headers=wait)
        case ClosingError() | ClosedError():
            refused = RefusedError(503, "the server is shutting down", code="shutting_down")
        case ContextError():
            refused = RefusedError(400, str(error), param="messages", code="context_length_exceeded")
        case MemoryLimitError():
            refused = RefusedError(413, str(error), code="memory_limit")
        case MagistralError():
            refused = RefusedError(400, str(error), code="invalid_value")
        case _:
            refused = RefusedError(500, "internal error; the server's log says where", code="internal_error")
    return refused


def validation_refusal(errors: Sequence[Any]) -> RefusedError:
    """The first mistake in a body, with the path of its field."""
    first = cast("dict[str, Any]", errors[0])
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return RefusedError(400, "the body is not JSON", code="invalid_json")
    if not place:
        message = "the body: expected a JSON object, sent with Content-Type: application/json"
        return RefusedError(400, message, code="invalid_value")
    where = ".".join(place)
    return RefusedError(400, f"{where}: {first['msg']}", param=where, code="invalid_value")


def log(error: Exception) -> None:
    """Log an internal error: its type and traceback, not its message, which may quote the request."""
    if refusal(error).code == "internal_error":
        places = "".join(traceback.format_tb(error.__traceback__))
        logger.error("internal error, %s:\n%s", type(error).__name__, places)
