"""A stand-in for the Hugging Face Hub: the calls that huggingface_hub makes for a push.

    with hub_server() as hub:                       # hub.url for HF_ENDPOINT
        ...
        hub.repositories["me/model"].branches["main"]["config.json"]   # bytes as they arrived

`hub.refuse = ("commit", 403, "words")` makes one kind of call fail.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_stand_in_token"
ROUTES = {  # method and path -> kind of call
    "create": r"POST /api/repos/create",
    "card": r"POST /api/validate-yaml",
    "branch": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)",
    "preupload": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<branch>[^/]+)",
    "commit": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<branch>[^/]+)",
    "tree": r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<branch>[^/]+)",
    "info": r"GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<branch>[^/]+))?",
    "batch": r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "put": r"PUT /lfs/(?P<oid>[0-9a-f]{64})",
}


@dataclass
class Repository:
    """Files of each branch, and the messages of its commits."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds; a test reads and changes it."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content
    refuse: tuple[str, int, str] | None = None
    calls: list[str] = field(default_factory=list)

    def answer(self, kind: str, parts: dict[str, str], body: bytes) -> tuple[int, Any]:
        """(status, JSON) of one call."""
        self.calls.append(kind)
        if self.refuse and self.refuse[0] == kind:
            return self.refuse[1], {"error": self.refuse[2]}
        repository = self.repositories.get(parts.get("repo") or "")
        branch = unquote(parts.get("branch") or "main")
        if kind == "create":
            return self._create(json.loads(body))
        if kind == "card":
            return 200, {}
        if kind == "put":
            if hashlib.sha256(body).hexdigest() != parts["oid"]:
                return 400, {"error": "another content than its sha256"}
            self.large[parts["oid"]] = body
            return 200, {}
        if repository is None:
            return 404, {"error": "Repository not found"}
        if kind == "branch":
            known = branch in repository.branches
            repository.branches.setdefault(branch, dict(repository.branches["main"]))
            return (409 if known else 200), {"error": "Reference already exists"}
        if branch not in repository.branches:
            return 404, {"error": f"Invalid rev id: {branch}"}
        files = repository.branches[branch]
        if kind == "info":
            return 200, {"id": parts["repo"], "private": repository.private, "sha": "0" * 40}
        if kind == "tree":
            return 200, [
                {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}
                for name, content in files.items()
            ]
        if kind == "preupload":
            return 200, {"files": [_mode(f["path"], files) for f in json.loads(body)["files"]]}
        if kind == "batch":
            return 200, {"objects": [self._slot(o) for o in json.loads(body)["objects"]]}
        self._commit(repository, branch, body)
        url = f"{self.url}/{parts['repo']}/commit/{'1' * 40}"
        return 200, {"commitUrl": url, "commitOid": "1" * 40, "success": True}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            known = {"url": f"{self.url}/{name}", "error": "You already created this model repo"}
            return 409, known
        self.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return 200, {"url": f"{self.url}/{name}"}

    def _slot(self, expected: dict[str, Any]) -> dict[str, Any]:
        if expected["oid"] in self.large:
            return expected
        return expected | {"actions": {"upload": {"href": f"{self.url}/lfs/{expected['oid']}"}}}

    def _commit(self, repository: Repository, branch: str, body: bytes) -> None:
        files = dict(repository.branches[branch])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.commits.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        repository.branches[branch] = files


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _mode(name: str, files: dict[str, bytes]) -> dict[str, Any]:
    large = name.endswith(".safetensors")
    content = files.get(name)
    digest = hashlib.sha256(content).hexdigest() if content is not None and large else None
    oid = digest or (_git_oid(content) if content is not None else None)
    return {
        "path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
        "oid": oid,
    }  # fmt: skip


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Serves on a free port of the loopback interface until the block ends."""
    hub, lock = Hub(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_call(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size) if size else self._chunks()
            path = f"{self.command} {urlsplit(self.path).path}"
            found = ((kind, re.fullmatch(pattern, path)) for kind, pattern in ROUTES.items())
            kind, match = next(((k, m) for k, m in found if m), ("unknown", None))
            with lock:
                if match is None:
                    status, answer = 501, {"error": f"the stand-in does not know {path}"}
                elif kind != "put" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    status, answer = 401, {"error": "Invalid credentials in Authorization header"}
                else:
                    status, answer = hub.answer(kind, match.groupdict(), body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status >= 400:
                self.send_header("X-Error-Message", answer["error"])
            self.end_headers()
            self.wfile.write(content)

        def _chunks(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return b""
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = handle_call  # noqa: N815

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT and its kin would do, had they been set before the library's import."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # Xet's own storage service is not stood in for: large files take the plain way here
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process pushes to."""
    with hub_server() as hub:
        point_at(monkeypatch, hub.url)
        yield hub
