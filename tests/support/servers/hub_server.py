"""A stand-in for the hub on this machine: what its client asks for to read a data set or a model.

Repositories are folders of files by revision; `HF_ENDPOINT` of a child process points here.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

Files = dict[str, bytes]


@dataclass
class Hub:
    """Revisions of data sets and models, and every request that came."""

    revisions: dict[str, dict[str, Files]]  # "org/name" -> branch -> path -> bytes
    requests: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    endpoint: str = ""

    def commit(self, repo: str, branch: str) -> str:
        """The commit of a branch: a digest of its files."""
        content = sorted(self.revisions[repo][branch].items())
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def files(self, repo: str, revision: str) -> tuple[str, Files] | None:
        for branch, files in self.revisions.get(repo, {}).items():
            commit = self.commit(repo, branch)
            if revision in (branch, commit):
                return commit, files
        return None


@contextlib.contextmanager
def hub(revisions: dict[str, dict[str, Files]]) -> Iterator[Hub]:
    """Serves the repositories on a free port of this machine until the block ends."""
    served = Hub(revisions)

    class Handler(_Handler):
        hub = served

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def read_from(served: Hub, home: Path, patch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME would do, had they been set before the libraries' import."""
    constants, config = "huggingface_hub.constants", "datasets.config"
    patch.setattr(f"{constants}.ENDPOINT", served.endpoint)
    patch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE",
        f"{served.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    patch.setattr(f"{constants}.HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    patch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    patch.setattr(f"{config}.HF_ENDPOINT", served.endpoint)
    patch.setattr(f"{config}.HF_HUB_OFFLINE", False)
    patch.setattr(f"{config}.HF_DATASETS_CACHE", home / "datasets")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.hub.requests.append(f"{self.command} {url.path}")
        if parts[0] == "api" and parts[1] in ("datasets", "models") and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:], body, with_body)
            return
        parts = parts[1:] if parts[0] == "datasets" else parts
        if parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)
        else:
            self._send(404, b"{}", {}, with_body)

    def _api(self, repo: str, rest: list[str], body: bytes, with_body: bool) -> None:
        action, revision, path = (
            [*rest, "", ""][0],
            [*rest, "", ""][1] or "main",
            "/".join(rest[2:]),
        )
        found = self.hub.files(repo, revision)
        if found is None:
            code = "RevisionNotFound" if repo in self.hub.revisions else "RepoNotFound"
            self._send(404, b"{}", {"X-Error-Code": code}, with_body)
            return
        commit, files = found
        entries = [_entry(name, content) for name, content in files.items()]
        if action in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            value: Any = {"id": repo, "sha": commit, "siblings": siblings, "tags": [],
                          "private": False, "gated": False, "disabled": False}  # fmt: skip
        elif action == "tree":
            inside = [e for e in entries if e["path"].startswith(f"{path}/" if path else "")]
            folders = {e["path"].rsplit("/", 1)[0] for e in inside if "/" in e["path"]}
            value = inside + [{"type": "directory", "path": f, "oid": "0" * 40} for f in folders]
        elif action == "paths-info":
            asked = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            value = [entry for entry in entries if entry["path"] in asked]
        else:
            self._send(404, b"{}", {}, with_body)
            return
        self._send(200, json.dumps(value).encode(), {"X-Repo-Commit": commit}, with_body)

    def _file(self, repo: str, revision: str, path: str, with_body: bool) -> None:
        found = self.hub.files(repo, revision)
        if found is None or path not in found[1]:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
            return
        commit, content = found[0], found[1][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is None:
            self._send(200, content, headers, with_body)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], headers, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.hub.sent_bytes += len(body)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
