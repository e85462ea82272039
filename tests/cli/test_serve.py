"""`magistral-mlx serve` as a user sees it: one line with the address, Ctrl-C, errors."""

import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from magistral_mlx.cli import serve as command
from magistral_mlx.cli.app import cli
from magistral_mlx.fetch.hub import known_as, source
from tests.serving import ASK


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAGISTRAL_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MAGISTRAL_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)


def serve(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli, ["serve", "--model", "demo", "--port", "0", *arguments])


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_its_address_and_ends_on_a_signal(signal_sent: signal.Signals):
    command = [sys.executable, "-m", "magistral_mlx", "serve", "-m", "demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout
        line = server.stdout.readline()
        assert line.startswith("serving demo at http://127.0.0.1:")
        assert '/v1"' in line
        port = int(line.partition("http://127.0.0.1:")[2].split()[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps(ASK | {"stream": True, "temperature": 50, "top_p": 1})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read(100)
        server.send_signal(signal_sent)
        rest = response.read().decode()  # it ends, and says why
        assert "shutting_down" in rest
        output = server.communicate(timeout=60)
        connection.close()
    assert server.returncode == 0
    assert output == ("", "ended\n")


def test_other_machines_need_a_key():
    refused = serve("--host", "0.0.0.0")
    assert refused.exit_code == 1
    assert "MAGISTRAL_API_KEY" in refused.stderr


@pytest.mark.parametrize("key", ["", "two\nlines", " padded", "Schlüssel"])
def test_invalid_keys_are_refused(key: str):
    assert serve("--api-key", key).exit_code == 1


def test_a_missing_server_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    refused = serve()
    assert refused.exit_code == 1
    assert 'pip install "magistral_mlx[server]"' in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_address_of_another_machine_is_refused():
    refused = serve("--host", "203.0.113.7", "--api-key", "k")
    assert refused.exit_code == 1
    assert "--host is an address of this machine" in refused.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("1GB", 10**9), ("500 mb", 5 * 10**8), ("1.5gb", 1_500_000_000), ("0", 0), ("7", 7)]
)
def test_sizes_are_read(text: str, size: int):
    assert command._bytes(None, None, text) == size  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "1TB", "-1", "GB", "1e9", "٣GB"])
def test_invalid_sizes_are_refused(text: str):
    assert serve("--prefix-cache", text).exit_code == 2


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("demo", ["demo"]),
        ("mistralai/Magistral-Small-2506", ["mistralai/Magistral-Small-2506"]),
        (
            "mlx-community/Magistral-Small-2507-4bit",
            ["mistralai/Magistral-Small-2507", "mlx-community/Magistral-Small-2507-4bit"],
        ),
        ("somebody/Else@main", ["somebody/Else", "somebody/Else@main"]),
    ],
)
def test_a_model_has_its_own_and_its_originals_name(name: str, names: list[str]):
    assert known_as(name) == names


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("---\nlicense: x\nbase_model: mistralai/Magistral-Small-2506\n---\n\n# Hi\n", True),
        ("---\nlicense: x\n---\nbase_model: a/b\n---\n", False),
        ("base_model: a/b\n", False),
        (None, False),
    ],
)
def test_a_converted_directory_knows_its_source(tmp_path: Path, card: str | None, known: bool):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert source(str(tmp_path)) == ("mistralai/Magistral-Small-2506" if known else None)
    assert known_as(str(tmp_path))[-1] == tmp_path.name
