"""A hub on loopback: redirects, ranges, gated repositories, broken connections, and uploads with LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves ``root/org/name/file``; ``main`` is the only revision.

    Attributes:
        gated: Repositories that need the token ``secret``.
        broken: Files (by their last name) whose next download breaks in the middle.
        requests: Method, path and range of every download.
        objects: Uploaded LFS objects by hash.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.requests: list[tuple[str, str, str]] = []
        self.objects: dict[str, bytes] = {}

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


def connect(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process use the server, and an empty cache."""
    from huggingface_hub import constants

    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "DOWNLOAD_CHUNK_SIZE": 1 << 16,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)


def _is_redirected(path: str) -> bool:
    return path.endswith((".safetensors", ".bin")) and "/resolve/" in path


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def do_PUT(self) -> None:
        """One LFS object."""
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._send(200, b"", {})

    def do_POST(self) -> None:
        body, answer, url = self._body(), {}, self.server.url
        if self.path == "/api/repos/create":
            named = json.loads(body)
            repo = f"{named['organization']}/{named['name']}"
            (self.server.root / repo).mkdir(parents=True)
            answer = {"url": f"{url}/{repo}"}
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
            files = zip(paths, modes, strict=True)
            answer = {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in files]}
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{**one, "actions": {"upload": {"href": f"{url}/lfs/{one['oid']}"}}} for one in objects]
            answer = {"transfer": "basic", "objects": upload}
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                self._commit(self.server.root / found[1], **line)
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{url}/{found[1]}/commit/{COMMIT}"}
        self._send(200, json.dumps(answer).encode(), {})

    def _commit(self, folder: Path, key: str, value: dict[str, str]) -> None:
        """One line of a commit: a file's content, or the hash of its LFS object."""
        if key in ("file", "lfsFile"):
            (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            content = self.server.objects[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"])
            (folder / value["path"]).write_bytes(content)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

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
