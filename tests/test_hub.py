"""Names → directories: on this machine, on a Hub served here on the loopback, and with none at all."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from magistral_mlx import hub
from magistral_mlx.errors import CheckpointError, HubError

ORIGINAL = "mistralai/Magistral-Small-2506"
SHA = "0123456789abcdef0123456789abcdef01234567"
REPOS = {
    ORIGINAL: {
        "consolidated.safetensors": b"native",
        "params.json": b"{}",
        "tekken.json": b"tekken",
        "SYSTEM_PROMPT.txt": b"Think.",
        "model-00001-of-00001.safetensors": b"hf",
        "model.safetensors.index.json": b"{}",
        "config.json": b"{}",
        "README.md": b"#",
    },
    hub.RECOMMENDED: {
        "model.safetensors": b"4 bit",
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "README.md": b"#",
    },
    "someone/words-only": {"config.json": b"{}"},
}


ODD = ("~nobody-of-this-name/a", "\0", "a" * 9999)


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub as huggingface_hub asks for: a commit, its tree, and files."""

    served: Counter[str]

    def do_GET(self):
        repo, _, rest = self._parts()
        if repo not in REPOS:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif rest.startswith("revision/") and rest not in ("revision/main", f"revision/{SHA}"):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif rest.startswith("tree/"):
            files = REPOS[repo].items()
            tree = [{"type": "file", "path": f, "size": len(d), "oid": _etag(d)} for f, d in files]
            self._send(200, json.dumps(tree).encode())
        elif rest.startswith("resolve/"):
            self._file(repo, rest.split("/", 2)[2])
        else:
            siblings = [{"rfilename": name} for name in REPOS[repo]]
            self._send(200, json.dumps({"id": repo, "sha": SHA, "siblings": siblings}).encode())

    do_HEAD = do_GET  # noqa: N815 -- the name that http.server calls

    def log_message(self, *args):
        pass

    def _parts(self):
        path = self.path.partition("?")[0].removeprefix("/api/models").lstrip("/")
        owner, name, *rest = path.split("/", 2)
        return f"{owner}/{name}", None, "".join(rest)

    def _file(self, repo, name):
        data = REPOS[repo][name]
        if self.command == "GET":
            self.served[f"{repo}/{name}"] += 1
        self._send(200, data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": SHA})

    def _send(self, status, body, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _point_at(endpoint: str, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    files = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + files)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """An empty cache, and a Hub at a port where nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _point_at("http://127.0.0.1:9", monkeypatch)


@pytest.fixture
def served(no_hub, monkeypatch):
    """The fake Hub on the loopback; counts the files fetched from it."""
    FakeHub.served = Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    _point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield FakeHub.served
    server.shutdown()
    server.server_close()


def test_demo_is_in_the_package():
    assert hub.resolve("demo").weights == hub.resolve("demo").words == hub.DEMO


def test_a_directory_is_itself(tmp_path, monkeypatch):
    assert hub.resolve(str(tmp_path)) == hub.Local(weights=tmp_path, words=tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/repo").mkdir(parents=True)
    assert hub.resolve("owner/repo").weights == Path("owner/repo")


@pytest.mark.parametrize(
    "name", ["nowhere", "./a", "../a/b", "~/a", "/a/b", "a/b/c", "", "a b/c", "a/b@", *ODD]
)
def test_what_is_no_name_at_all(name, no_hub):
    with pytest.raises(CheckpointError, match=r'Expected a directory, a Hub name .* or "demo"; found no dir'):
        hub.resolve(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="found no directory"):
        hub.resolve(str(tmp_path / "model.gguf"))


def test_only_mistrals_own_layout_is_downloaded(served):
    found = hub.resolve(ORIGINAL, download=True)
    assert found.weights == found.words
    expected = {"consolidated.safetensors", "params.json", "tekken.json", "SYSTEM_PROMPT.txt"}
    assert {path.name for path in found.weights.iterdir()} == expected
    assert served == Counter(f"{ORIGINAL}/{name}" for name in expected)


def test_a_conversion_gets_its_words_from_the_original(served):
    found = hub.resolve(hub.RECOMMENDED, download=True)
    assert {path.name for path in found.weights.iterdir()} == REPOS[hub.RECOMMENDED].keys() - {"README.md"}
    assert (found.words / "tekken.json").read_bytes() == b"tekken"
    assert (found.words / "SYSTEM_PROMPT.txt").read_bytes() == b"Think."
    assert not any(fnmatch(name, "*2506/*.safetensors") for name in served)


@pytest.mark.parametrize("name", [ORIGINAL, hub.RECOMMENDED, f"{hub.RECOMMENDED}@{SHA}"])
def test_what_was_downloaded_is_found_without_a_network(name, served, monkeypatch):
    found = hub.resolve(name, download=True)
    fetched = served.copy()
    assert hub.resolve(name, download=True) == found
    assert hub.resolve(name) == found
    assert served == fetched, "a second look fetches nothing"
    _point_at("http://127.0.0.1:9", monkeypatch)
    assert hub.resolve(name) == hub.resolve(name, download=True) == found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve(name) == hub.resolve(name, download=True) == found


def test_nothing_is_downloaded_without_being_asked(served):
    with pytest.raises(HubError, match=f"neither a directory .* hf download {hub.RECOMMENDED}$"):
        hub.resolve(hub.RECOMMENDED)
    with pytest.raises(HubError, match=r"--include 'consolidated\*\.safetensors' .* --include 'tekken"):
        hub.resolve(ORIGINAL)
    assert not served


def test_an_interrupted_download_is_not_a_model(served):
    weights = hub.resolve(hub.RECOMMENDED, download=True).weights
    (weights / "model.safetensors").unlink()
    with pytest.raises(HubError, match="hf download"):
        hub.resolve(hub.RECOMMENDED)
    assert (hub.resolve(hub.RECOMMENDED, download=True).weights / "model.safetensors").is_file()


def test_missing_words_are_named(served, monkeypatch):
    hub._fetch(hub.RECOMMENDED, None)
    with pytest.raises(HubError, match=rf"hf download {ORIGINAL} --include 'tekken\.json'"):
        hub.resolve(hub.RECOMMENDED)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("someone/unknown", "the Hub has none, or a private one"),
        (f"{ORIGINAL}@gone", "no such revision"),
        ("someone/words-only", "has no safetensors weights"),
        ("some--one/..x", "it cannot be a Hub name"),
    ],
)
def test_what_the_hub_does_not_have(name, says, served):
    with pytest.raises(HubError, match=says):
        hub.resolve(name, download=True)


def test_a_gated_model(served, monkeypatch):
    gated = {"X-Error-Code": "GatedRepo"}
    monkeypatch.setattr(FakeHub, "_file", lambda self, *_: self._send(403, b"", gated))
    with pytest.raises(HubError, match="it is gated"):
        hub.resolve(ORIGINAL, download=True)


def test_a_full_disk(served, monkeypatch):
    def full(*args, local_files_only, **kwargs):
        raise LocalEntryNotFoundError("none") if local_files_only else OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(HubError, match=r"this machine cannot keep it .*No space left"):
        hub._fetch(ORIGINAL, None)


def test_a_hub_that_breaks_down(served, monkeypatch):
    monkeypatch.setattr(FakeHub, "_file", lambda self, *_: self._send(500, b""))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its five tries
    with pytest.raises(HubError, match="not reached, or broke off"):
        hub.resolve(ORIGINAL, download=True)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub was not reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_no_network(setting, says, tmp_path):
    code = "from magistral_mlx import hub; hub.resolve('mistralai/Magistral-Small-2506', download=True)"
    env = os.environ | {"HF_HOME": str(tmp_path)} | setting
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("magistral_mlx.errors.HubError: 'mistralai/Magistral")
    assert says in done.stderr.splitlines()[-1]
