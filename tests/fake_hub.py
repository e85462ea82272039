"""A fake Hugging Face Hub on loopback: what huggingface_hub needs for down- and uploads; faults on demand.

Large files are LFS objects under their SHA-256, others git blobs; a file's range is served; an upload goes by
`preupload`, the LFS batch, a PUT and a verification per object, and one commit of lines of JSON. An object
whose bytes do not match its hash is refused, and so is a commit that names an object that was not uploaded.
Not implemented: Xet storage, multipart uploads, redirects to a CDN.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Its content, the requests it received, and the faults to inject.

    cuts: file name → how many bytes each further request gets before the connection is closed.
    """

    repos: dict[str, dict[str, bytes]]
    url: str = ""
    token: str | None = None
    private: set[str] = field(default_factory=set)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    ranges_ignored: bool = False
    put_status: list[int] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    ranges: list[str | None] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)


def is_lfs(name: str, size: int) -> bool:
    return name.endswith(".safetensors") or size > 10 * 2**20


def etag(name: str, data: bytes) -> str:
    """As on the Hub: the SHA-256 of an LFS object, git's hash of a blob."""
    if is_lfs(name, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_info(name: str, data: bytes) -> dict[str, Any]:
    lfs = {"sha256": etag(name, data), "size": len(data), "pointerSize": 134}
    git = hashlib.sha1(data).hexdigest()
    return {"size": len(data), "blobId": git, "lfs": lfs} if is_lfs(name, len(data)) else {
        "size": len(data), "blobId": etag(name, data),
    }  # fmt: skip


def tree_entry(name: str, data: bytes) -> dict[str, Any]:
    """A file as the Hub's tree endpoint lists it."""
    info = file_info(name, data)
    lfs = (
        {"lfs": {"oid": info["lfs"]["sha256"], "size": len(data), "pointerSize": 134}}
        if "lfs" in info
        else {}
    )
    return {"type": "file", "path": name, "size": len(data), "oid": info["blobId"]} | lfs


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        if path == "/api/whoami-v2":
            return self._json({"name": "someone", "type": "user"}) if self._allowed() else self._refuse(401)
        owner, name, *rest = path.removeprefix("/api/models").lstrip("/").split("/", 2)
        repo, rest = f"{owner}/{name}", "".join(rest)
        if repo not in self.hub.repos or (repo in self.hub.private and not self._allowed()):
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if rest.startswith("revision/") and rest not in ("revision/main", f"revision/{SHA}"):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.repos[repo]
        if rest.startswith("tree/"):
            return self._json([tree_entry(name, data) for name, data in files.items()])
        if rest.startswith("resolve/"):
            return self.file(repo, rest.split("/", 2)[2])
        siblings = [{"rfilename": name} | file_info(name, data) for name, data in files.items()]
        return self._json({"id": repo, "sha": SHA, "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815 -- the name that http.server calls

    def do_POST(self):
        path, body = self.path.partition("?")[0], self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            self.hub.cards.append(json.loads(body)["content"])
            self._json({"errors": [], "warnings": []})
        elif not self._allowed():
            self._refuse(401)
        else:
            self._post(path.strip("/").split("/"), body)

    def _post(self, path: list[str], body: bytes) -> None:
        match path:
            case ["api", "repos", "create"]:
                self._create(**json.loads(body))
            case ["api", "models", _, _, "preupload", "main"]:
                self._json({"files": [self._mode(file) for file in json.loads(body)["files"]]})
            case ["api", "models", owner, name, "commit", "main"]:
                self._commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
            case [_, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                actions = [self._action(wanted) for wanted in json.loads(body)["objects"]]
                self._json({"transfer": "basic", "objects": actions})
            case ["verify"]:
                wanted = json.loads(body)
                known = len(self.hub.objects.get(wanted["oid"], b"")) == wanted["size"]
                self._json({}) if known else self._refuse(404)
            case _:
                self._refuse(404)

    def _create(self, *, name: str, organization: str | None, **_: object) -> None:
        if organization != "someone":
            self._refuse(403)
            return
        self.hub.repos.setdefault(f"someone/{name}", {})
        self._json({"url": f"{self.hub.url}/someone/{name}", "name": f"someone/{name}"})

    def do_PUT(self):
        body, oid = self.rfile.read(int(self.headers["Content-Length"])), self.path.rpartition("/")[2]
        if self.hub.put_status:
            return self._refuse(self.hub.put_status.pop(0))
        if hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400)
        self.hub.puts.append(oid)
        self.hub.objects[oid] = body
        return self._send(200, b"")

    def log_message(self, *args):
        pass

    def file(self, repo: str, name: str) -> None:
        """Send a file, the requested range of it, or as much as `cuts` allows."""
        data = self.hub.repos[repo][name]
        start, status = 0, 200
        headers = {"ETag": f'"{etag(name, data)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if is_lfs(name, len(data)):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        if (wanted := self.headers["Range"]) and not self.hub.ranges_ignored:
            start, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            self.hub.served[f"{repo}/{name}"] += 1
            self.hub.ranges.append(wanted)
        cuts = self.hub.cuts.get(name) if self.command == "GET" else None
        self._send(status, data[start:], headers, only=cuts.pop(0) if cuts else None, name=name)

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.objects:
            return wanted
        upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
        return wanted | {"actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            match line:
                case {"key": "file", "value": {"path": path, "content": content}}:
                    self.hub.repos[repo][path] = base64.b64decode(content)
                case {"key": "lfsFile", "value": {"path": path, "oid": oid, "size": size}}:
                    if len(self.hub.objects.get(oid, b"")) != size:
                        return self._refuse(400)
                    self.hub.repos[repo][path] = self.hub.objects[oid]
                case {"key": "header", "value": {"summary": summary}}:
                    self.hub.commits.append(summary)
                case _:
                    return self._refuse(400)
        url = f"{self.hub.url}/{repo}/commit/{SHA}"
        return self._json({"success": True, "commitUrl": url, "commitOid": SHA})

    def _allowed(self) -> bool:
        return self.hub.token is not None and self.headers["Authorization"] == f"Bearer {self.hub.token}"

    def _refuse(self, status: int) -> None:
        self._send(status, json.dumps({"error": f"refused with {status}"}).encode())

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status, body, headers=(), *, only=None, name=None):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent[name or ""] += len(body[:only])
            self.wfile.write(body[:only])
        self.close_connection = True


@contextmanager
def running(repos: dict[str, dict[str, bytes]]):
    """The Hub, answering on a port of the loopback."""
    hub = Hub(repos={name: dict(files) for name, files in repos.items()})
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def point_at(endpoint: str, monkeypatch) -> None:
    """Make huggingface_hub use this endpoint."""
    from huggingface_hub import constants  # noqa: PLC0415 -- half a second, and not in every test

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    files = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + files)
