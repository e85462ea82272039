"""A server in this process, on a free port of loopback, and helpers to call it."""

import gc
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from magistral_mlx import Magistral
from magistral_mlx.server.app import create_app
from magistral_mlx.server.connection import Connection
from magistral_mlx.server.host import Host, bind
from magistral_mlx.server.safety import Rules
from magistral_mlx.server.service import Service

HUB_ID = "mistralai/Magistral-Small-2506"
QUESTION = "What is 3 + 4?"
ASK = {"messages": [{"role": "user", "content": QUESTION}], "seed": 1}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, which has OpenAI's shape."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """The server-sent events before the final `[DONE]`."""
        *events, last = [
            e for e in self.body.decode().replace("\r", "").split("\n\n") if e.startswith("data")
        ]
        assert last == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


class Running:
    """A running server; leaving the `with` block ends it."""

    def __init__(
        self,
        model: Magistral,
        *,
        rules: Rules | None = None,
        running: int = 4,
        waiting: int = 64,
        prefix_bytes: int = 8 * 2**20,
        connection: type[Connection] = Connection,
    ) -> None:
        self.service = Service(
            model, ids=[HUB_ID, "demo"], running=running, waiting=waiting, prefix_bytes=prefix_bytes
        )
        listening = bind("127.0.0.1", 0)
        self.port: int = listening.getsockname()[1]
        self.app = create_app(self.service, rules or Rules())
        self.host = Host(self.app, close=self.service.close, connection=connection)
        self._thread = threading.Thread(target=self.host.run, args=([listening],))
        self._thread.start()
        until(lambda: self.host.started)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str) -> Answer:
        return self.call("GET", path, None, headers)

    def post(self, path: str, body: object, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.call("POST", path, data, {"Content-Type": "application/json"} | headers)

    def call(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=150)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    @property
    def idle(self) -> bool:
        return not (self.service.slots.running or self.service.slots.waiting)

    def idle_memory(self) -> int:
        """Wait until nothing runs; returns active memory in bytes, without what the prefix cache declares."""
        until(lambda: self.idle)
        self.service.model.run(lambda: None)  # wait for what was queued after the last step
        gc.collect()  # frames of cancelled tasks refer to one another
        return mx.get_active_memory() - self.service.prefixes.nbytes

    def end(self) -> None:
        self.host.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.01)
