"""A hub on loopback: redirects, ranges, gated repositories, broken connections, new repositories, and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from huggingface_hub import constants, file_download, utils

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves ``root/org/name/file``; ``main`` is the only revision."""

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, ""
        self.gated: set[str] = set()  # repositories that need the token `secret`
        self.broken: set[str] = set()  # names of files whose next download breaks in the middle
        self.requests: list[tuple[str, str, str]] = []  # method, path and range

    def downloads(self) -> list[str]:
        """Names of the files that were sent, in order; of a redirected file the last request counts."""
        sent = [path for method, path, _ in self.requests if method == "GET" and not path.startswith("/api/")]
        return [path.rpartition("/")[2] for path in sent if not _is_redirected(path)]

    def files(self, repo: str) -> list[dict[str, Any]]:
        files = [path for path in sorted((self.root / repo).rglob("*")) if path.is_file()]
        return [{"path": path.relative_to(self.root / repo).as_posix(), "size": path.stat().st_size} for path in files]

    def refusal(self, request: Request, repo: str, revision: str) -> Response | None:
        if repo in self.gated and request.headers.get("Authorization") != "Bearer secret":
            return _error(403, "GatedRepo")
        if not (self.root / repo).is_dir():
            return _error(404, "RepoNotFound")
        return None if revision in ("main", COMMIT) else _error(404, "RevisionNotFound")

    def send(self, request: Request, path: Path) -> Response:
        if request.method == "GET" and path.name in self.broken:
            self.broken.discard(path.name)
            half = path.read_bytes()[: path.stat().st_size // 2]
            return StreamingResponse(iter([half]), headers={**_headers(path), "Content-Length": str(2 * len(half) + 1)})
        return FileResponse(path, headers=_headers(path)) if path.is_file() else _error(404, "EntryNotFound")


@contextmanager
def serving(root: Path) -> Iterator[HubServer]:
    """A running hub."""
    hub = HubServer(root)
    with running(_app(hub)) as hub.url:
        yield hub


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The URL of a server of an application."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=0))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def connect(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process use the server, and an empty cache."""
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True, "DOWNLOAD_CHUNK_SIZE": 1 << 16,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
        if hasattr(file_download, name):  # huggingface_hub 0.x copies some of them
            monkeypatch.setattr(file_download, name, value)
    set_offline(False, monkeypatch)


def set_offline(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set ``HF_HUB_OFFLINE`` for this process."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    if hasattr(utils, "reset_sessions"):  # a session of huggingface_hub 0.x keeps the setting
        utils.reset_sessions()


def _app(hub: HubServer) -> FastAPI:
    app = FastAPI()

    @app.get("/api/models/{org}/{name}")
    @app.get("/api/models/{org}/{name}/revision/{revision:path}")
    def info(request: Request, org: str, name: str, revision: str = "main") -> Response:
        repo = f"{org}/{name}"
        siblings = [{"rfilename": file["path"], "size": file["size"]} for file in hub.files(repo)]
        described = {"id": repo, "sha": COMMIT, "siblings": siblings}
        return hub.refusal(request, repo, revision) or JSONResponse(described)

    @app.get("/api/models/{org}/{name}/tree/{revision}")
    def tree(org: str, name: str) -> list[dict[str, Any]]:
        return [{"type": "file", "oid": "0", **file} for file in hub.files(f"{org}/{name}")]

    @app.api_route("/{org}/{name}/resolve/{revision}/{file:path}", methods=["GET", "HEAD"])
    def resolve(request: Request, org: str, name: str, revision: str, file: str) -> Response:
        path = hub.root / org / name / file
        if (refused := hub.refusal(request, f"{org}/{name}", revision)) is not None:
            return refused
        if path.is_file() and _is_redirected(request.url.path):
            return RedirectResponse(f"/cdn/{org}/{name}/{file}", 302, _headers(path))
        return hub.send(request, path)

    @app.api_route("/cdn/{file:path}", methods=["GET", "HEAD"])
    def cdn(request: Request, file: str) -> Response:
        return hub.send(request, hub.root / file)

    @app.post("/api/repos/create")
    def create(named: dict[str, Any]) -> dict[str, str]:
        repo = f"{named['organization']}/{named['name']}"
        (hub.root / repo).mkdir(parents=True)
        return {"url": f"{hub.url}/{repo}"}

    @app.post("/api/validate-yaml")
    def validate() -> dict[str, Any]:
        return {}

    @app.post("/api/models/{org}/{name}/preupload/{revision}")
    def preupload(sent: dict[str, Any]) -> dict[str, Any]:
        modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in sent["files"]]
        return {"files": modes}

    @app.post("/api/models/{org}/{name}/commit/{revision}")
    async def commit(request: Request, org: str, name: str) -> dict[str, str]:
        for operation in map(json.loads, (await request.body()).splitlines()):
            if operation["key"] == "file":
                path = hub.root / org / name / operation["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(operation["value"]["content"]))
        return {"commitUrl": f"{hub.url}/{org}/{name}/commit/{COMMIT}", "commitOid": COMMIT}

    @app.middleware("http")
    async def record(request: Request, answer: Any) -> Response:
        hub.requests.append((request.method, request.url.path, request.headers.get("Range", "")))
        return await answer(request)

    return app


def _is_redirected(path: str) -> bool:
    return path.endswith((".safetensors", ".bin")) and "/resolve/" in path


def _error(status: int, code: str) -> Response:
    return Response(status_code=status, headers={"X-Error-Code": code, "X-Error-Message": code})


def _headers(path: Path) -> dict[str, str]:
    etag = f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"' if path.is_file() else ""
    size = str(path.stat().st_size) if path.is_file() else ""
    return {"ETag": etag, "X-Repo-Commit": COMMIT, "X-Linked-Etag": etag, "X-Linked-Size": size}
