"""A server on loopback that speaks the hub's protocol: redirects, ranges, gated repositories, broken connections."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves ``root/org/name/file``; ``main`` is the only revision.

    Attributes:
        gated: Repositories that need the token ``secret``.
        broken: Files (by their last name) whose next download breaks in the middle.
        requests: Method, path and range of every request.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.requests: list[tuple[str, str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[str]:
        """Names of the files that were sent, in order; of a redirected file the last request counts."""
        sent = [path for method, path, _ in self.requests if method == "GET" and not path.startswith("/api/")]
        return [path.rpartition("/")[2] for path in sent if not _is_redirected(path)]


@contextmanager
def serving(root: Path) -> Iterator[HubServer]:
    """A running server."""
    server = HubServer(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _is_redirected(path: str) -> bool:
    return path.endswith((".safetensors", ".bin")) and "/resolve/" in path


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self, send: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range", "")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.+", path):
            self._send(
                200, json.dumps([{"type": "file", "oid": "0", **file} for file in self._files(found[1])]).encode(), {}
            )
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if self._refused(found[1], found[2]):
                return
            file = self.server.root / found[1] / found[3]
            if not file.is_file():
                self._error(404, "EntryNotFound")
            elif _is_redirected(path):
                self._send(302, b"", {**_file_headers(file), "Location": f"/cdn/{found[1]}/{found[3]}"})
            else:
                self._file(file, send)
        elif path.startswith("/cdn/") and (file := self.server.root / path[5:]).is_file():
            self._file(file, send)
        else:
            self._error(404, "")

    def _info(self, repo: str, revision: str) -> None:
        if self._refused(repo, revision):
            return
        siblings = [{"rfilename": file["path"], "size": file["size"]} for file in self._files(repo)]
        self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), {})

    def _files(self, repo: str) -> list[dict[str, Any]]:
        folder = self.server.root / repo
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return [{"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size} for path in files]

    def _refused(self, repo: str, revision: str) -> bool:
        if repo in self.server.gated and self.headers.get("Authorization") != "Bearer secret":
            self._error(403, "GatedRepo")
        elif not (self.server.root / repo).is_dir():
            self._error(404, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._error(404, "RevisionNotFound")
        else:
            return False
        return True

    def _file(self, file: Path, send: bool) -> None:
        data, headers, status = file.read_bytes(), _file_headers(file), 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(found[1]), int(found[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data, status = data[begin : end + 1], 206
        if send and file.name in self.server.broken:
            self.server.broken.discard(file.name)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self._send(status, data, headers, send)

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str], send: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if send and self.command != "HEAD":
            self.wfile.write(data)


def _file_headers(file: Path) -> dict[str, str]:
    size = str(file.stat().st_size)
    etag = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": size}
