"""Access rules, limits of size and time, and that no request brings the server down."""

import json
import logging
import random
import socket
import string
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from magistral_mlx import ServerError
from magistral_mlx.server.connection import Connection
from magistral_mlx.server.host import bind
from magistral_mlx.server.safety import LOOPBACK, Rules
from tests.scripted import scripted
from tests.server.test_server import send_request
from tests.serving import ASK, QUESTION, Running, until

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def restricted(served: Running) -> Iterator[Running]:
    """A key is set, bodies must be small and quick, one more host and one origin are allowed."""
    rules = Rules(
        key="secret",
        hosts=LOOPBACK | {"mac.local"},
        origins=frozenset({"https://friend.example"}),
        body_bytes=20_000,
        body_seconds=0.5,
    )
    with Running(served.service.model, rules=rules) as running:
        yield running


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:1", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.nip.io:8000", False),
        ("192.168.0.7", False),
        ("[", False),
        ("", False),
    ],
)
def test_foreign_host_names_are_refused(served: Running, host: str, allowed: bool):
    for answer in (served.get("/v1/models", Host=host), served.post(CHAT, ASK | {"n": 0}, Host=host)):
        assert (answer.status == 403) is not allowed
        if not allowed:
            assert answer.error["code"] == "foreign_host"


def test_other_hosts_are_allowed_by_name_or_as_ip_addresses(served: Running, restricted: Running):
    assert restricted.get("/health", Host="mac.local:8000").status == 200
    with Running(served.service.model, rules=Rules(key="k", any_address=True)) as any_address:
        assert any_address.get("/health", Host="192.168.0.7:8000").status == 200
        assert any_address.get("/health", Host="rebound.example").status == 403


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "file://", ""]
)
def test_requests_from_other_sites_are_refused(served: Running, origin: str):
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("OPTIONS", CHAT)):
        refused = served.call(method, path, b"{}", {"Origin": origin, "Content-Type": "text/plain"})
        assert (refused.status, refused.error["code"]) == (403, "foreign_origin")
        assert not any(name.startswith("access-control") for name in refused.headers)


def test_requests_from_our_own_page_are_answered(served: Running):
    assert served.post(CHAT, ASK, Origin=served.url, Host=f"127.0.0.1:{served.port}").status == 200


def test_an_allowed_site_may_send_requests_and_read_responses(restricted: Running):
    origin = {"Origin": "https://friend.example"}
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    permitted = restricted.call("OPTIONS", CHAT, None, origin | preflight)
    assert permitted.headers["access-control-allow-origin"] == "https://friend.example"
    answer = restricted.get("/v1/models", Authorization="Bearer secret", **origin)
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"


@pytest.mark.parametrize(
    ("headers", "valid"),
    [
        ({"Authorization": "Bearer secret"}, True),
        ({"authorization": "bearer secret"}, True),
        ({"x-api-key": "secret"}, True),
        ({"Authorization": "Bearer another", "x-api-key": "secret"}, True),
        ({}, False),
        ({"Authorization": "Bearer "}, False),
        ({"Authorization": "Bearer secreT"}, False),
        ({"Authorization": "Bearer sécret"}, False),
        ({"Authorization": "Basic secret"}, False),
        ({"x-api-key": "secret2"}, False),
        ({"x-api-key": ""}, False),
    ],
)
def test_every_route_but_health_needs_the_key(restricted: Running, headers: dict[str, str], valid: bool):
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        answer = restricted.get(path, **headers)
        assert answer.status == (200 if valid else 401)
        assert valid or answer.error["code"] == "invalid_api_key"
    assert restricted.post(CHAT, {}, **headers).status == (400 if valid else 401)
    assert restricted.get("/health").status == 200


def test_large_bodies_are_refused_while_they_arrive(restricted: Running):
    """Also a chunked body that never ends."""
    key = {"x-api-key": "secret"}
    assert restricted.post(CHAT, b"[" * 30_000, **key).status == 413
    with restricted.socket() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nx-api-key: secret\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        assert b" 413 " in send_endless_chunks(connection)
    assert restricted.get("/health").status == 200


def send_endless_chunks(connection: socket.socket) -> bytes:
    """Send chunks until the server answers or closes."""
    connection.settimeout(0.01)
    for _ in range(1000):
        with suppress(OSError):
            connection.sendall(b"1000\r\n" + b" " * 0x1000 + b"\r\n")
        try:
            return connection.recv(1000)
        except TimeoutError:
            continue
    return b""


def test_slow_bodies_are_refused(restricted: Running):
    with restricted.socket() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nx-api-key: secret\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b'{"mess')
        assert b" 408 " in b"".join(iter(lambda: connection.recv(1000), b""))


class ShortTimeouts(Connection):
    head_seconds = send_seconds = 0.5


@pytest.fixture(scope="module")
def server_with_short_timeouts(served: Running) -> Iterator[Running]:
    """Its timeouts are half a second; a key is set."""
    with Running(served.service.model, rules=Rules(key="secret"), connection=ShortTimeouts) as running:
        yield running


HEALTH_REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        (b"", 0),
        (b"GET /health HT", 0),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", 0),
        (HEALTH_REQUEST + b"GET /hea", 1),
        (b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n", 1),
    ],
    ids=["nothing", "a beginning", "headers", "a second request", "a body after the answer"],
)
def test_connections_that_send_byte_by_byte_are_closed(
    server_with_short_timeouts: Running, sent: bytes, answers: int
):
    """However short the pauses between the bytes."""
    with server_with_short_timeouts.socket() as connection:
        connection.sendall(sent)
        connection.settimeout(0.1)
        responses = b""
        try:
            while True:
                with suppress(TimeoutError):
                    if not (received := connection.recv(4096)):
                        break
                    responses += received
                if sent:
                    connection.sendall(b"x")
        except OSError:  # closed while we were sending
            pass
        assert responses.count(b"HTTP/1.1 ") == answers
    until(lambda: not server_with_short_timeouts.host.server_state.connections)


def test_a_connection_stays_open_while_its_answer_is_generated(tiny_tokenizer):
    """And takes another request afterwards."""
    slow = scripted(tiny_tokenizer("v11"), "word " * 4, step_seconds=0.05)
    with (
        slow as model,
        Running(model, connection=ShortTimeouts) as server,
        send_request(server, ASK) as connection,
    ):
        received = b""
        while b'"finish_reason": "stop"' not in received:
            received += connection.recv(65536)
            assert received
        connection.sendall(HEALTH_REQUEST)
        assert b" 200 OK" in connection.recv(65536)


def test_a_client_that_reads_nothing_is_disconnected(tiny_tokenizer):
    """Its generation is cancelled, and its connection closed."""
    endless = scripted(tiny_tokenizer("v11"), "word " * 5000, max_context=20_000)
    with endless as model, Running(model, connection=ShortTimeouts) as server:
        server.host.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with send_request(server, ASK | {"stream": True, "logprobs": True, "top_logprobs": 20}) as connection:
            connection.recv(1)
            assert server.service.slots.running == 1
            until(lambda: server.idle)
            until(lambda: not server.host.server_state.connections)


def test_no_prompt_is_logged_and_no_traceback_is_sent(
    served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("quoting what was asked: " + QUESTION)

    monkeypatch.setattr(served.service.model, "encode", fails)
    with caplog.at_level(logging.DEBUG):
        answer = served.post(CHAT, ASK)
        until(lambda: "in fails" in caplog.text)
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert "RuntimeError" in caplog.text
    assert QUESTION not in caplog.text + answer.body.decode()


def test_an_error_during_a_stream_is_sent_in_the_stream(served: Running, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> None:
        raise RuntimeError(QUESTION)

    monkeypatch.setattr(served.service.metrics, "replied", fails)
    answer = served.post(CHAT, ASK | {"stream": True})
    last = answer.body.decode().strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    until(lambda: served.idle)


def test_an_address_that_cannot_be_bound_is_an_error():
    with pytest.raises(
        ServerError, match=r"cannot listen on 192\.0\.2\.1:0 .*; --host is an address of this machine"
    ):
        bind("192.0.2.1", 0)  # reserved for documentation: not this machine's
    with bind("127.0.0.1", 0) as first, pytest.raises(ServerError, match="choose another --port"):
        bind("127.0.0.1", first.getsockname()[1])


INVALID_BODIES = [
    b"",
    b"\x00" * 100,
    b"\xff\xfe\xfd",
    b'{"messages": "\xff\xfe"}',
    b"[" * 100_000,
    b'{"messages":' * 50_000,
    b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b'{"messages": [{"role": "user", "content": ' + b"[" * 2000 + b"]" * 2000 + b"}]}",
    b"9" * 10_000,
    b'{"messages": [], "seed": ' + b"9" * 5000 + b"}",
    b'{"messages": [], "temperature": 1e999}',
    b'{"messages": [], "temperature": NaN, "top_p": -Infinity}',
    b"null",
    b"true",
    b'"text"',
    b"{}",
    b"[]",
    b'{"messages": null}',
    b'{"messages": {}}',
    b'{"messages": [null]}',
    b'{"messages": [[]]}',
    b'{"messages": [{"role": {}, "content": []}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": ""}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "stop": [' + b'"",' * 20 + b'""]}',
    b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"\\ud800": 1}}',
    b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"\\ud800": 1}]}',
    b'{"messages": [{"role": "tool", "content": "x"}]}',
    b'{"prompt": {"x": 1}}',
    b'{"prompt": [[1, "x"]]}',
    b'{"tokens": [1e400]}',
    b'{"tokens": [-1]}',
    b'{"\\ud800": 1}',
    b"--x\r\nContent-Disposition: form-data\r\n\r\n{}",
]
"""None of these is a valid request."""

POSTS = [
    *(CHAT, "/raw/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens"),
    *("/v1/tokenize", "/v1/detokenize"),
]


@pytest.mark.parametrize("body", INVALID_BODIES, ids=lambda body: repr(body[:40]))
def test_invalid_bodies_are_client_errors(served: Running, body: bytes):
    for path in (CHAT, "/v1/messages", "/v1/detokenize"):
        answer = served.post(path, body)
        assert 400 <= answer.status < 500
        assert answer.json["error"]["message"]


def broken_body(seed: int) -> bytes:
    """A damaged request: bytes changed, lost or doubled, or values of other types in its fields."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return rng.choice(INVALID_BODIES) + rng.randbytes(rng.randrange(3))
    if rng.random() < 0.4:
        wrong = [None, [], {}, -1, 2**70, 1e300, "x" * 3000, [[[]]], {"a": {"b": []}}, True, "\x00", "null"]
        body = ASK | {"max_tokens": 2} | {rng.choice([*ASK, "stop", "n", "tools"]): rng.choice(wrong)}
        return json.dumps(body).encode()
    data = bytearray(json.dumps(ASK | {"max_tokens": 2}).encode())
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at:]
                data += b" "
            case _:
                data[at:at] = data[: rng.randrange(len(data))]
    return bytes(data)


def send_broken_request(server: Running, seed: int) -> bytes:
    """Send a broken body in a broken way; returns the response's first bytes, none if it was closed."""
    rng, body = random.Random(-seed), broken_body(seed)
    headers = [
        "Host: localhost",
        f"Content-Type: {rng.choice(['application/json'] * 4 + ['text/plain', 'x'])}",
    ]
    manner = rng.choice(["whole", "whole", "half-closed", "cut off", "short", "long", "pieces", "header"])
    length = len(body) + {"short": -len(body) // 2, "long": 10}.get(manner, 0)
    headers.append(f"Content-Length: {length}")
    if manner == "header":
        headers.append("X: " + "".join(rng.choices(string.printable, k=50)))
    with server.socket() as connection:
        connection.settimeout(20)
        try:
            connection.sendall("\r\n".join([f"POST {rng.choice(POSTS)} HTTP/1.1", *headers, "", ""]).encode())
            step = max(1, len(body) // 5 if manner == "pieces" else len(body))
            for at in range(0, len(body), step):
                connection.sendall(body[at : at + step])
            if manner == "cut off":
                return b""
            if manner in ("half-closed", "long"):
                connection.shutdown(socket.SHUT_WR)
            return connection.recv(100)
        except OSError:  # closed before we had sent everything
            return b""


def send_broken_requests(server: Running, seeds: range) -> None:
    """From eight clients at once."""
    answers: dict[int, bytes] = {}

    def run_client(first: int) -> None:
        for seed in seeds[first::8]:
            answers[seed] = send_broken_request(server, seed)

    clients = [threading.Thread(target=run_client, args=(first,)) for first in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(150)
    assert len(answers) == len(seeds), "a client hangs"
    for seed, answer in answers.items():
        assert not answer or answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), (
            seed,
            broken_body(seed)[:300],
            answer,
        )
    assert server.post(CHAT, ASK).json["choices"][0]["finish_reason"] == "stop"
    until(lambda: server.idle)


def test_broken_requests_leave_the_server_working(served: Running):
    send_broken_requests(served, range(60))


@pytest.mark.slow
def test_500_broken_requests_leave_the_server_working(served: Running):
    send_broken_requests(served, range(1000, 1500))
