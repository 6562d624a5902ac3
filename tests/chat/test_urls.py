"""URLs of media: which are opened, and how their faults read."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lavis_chatbridge.chat.urls import Access, open_url
from lavis_chatbridge.errors import MediaError


@pytest.mark.parametrize(
    ("url", "content"),
    [
        ("data:;base64," + base64.b64encode(b"bytes").decode(), b"bytes"),
        ("DATA:image/png;base64,Ynl0\nZXM", b"bytes"),
        ("data:image/png;BASE64,Ynl0ZXM%3D", b"bytes"),
        ("data:text/plain,b%79tes", b"bytes"),
    ],
    ids=["plain", "broken lines, no padding", "escaped", "not base64"],
)
def test_data_urls(url: str, content: bytes):
    assert open_url(url, "it", Access()) == content


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,$$$", "not base64"),
        ("data:image/png;base64", "comma"),
        ("data:;base64,", "empty"),
        ("data:," + "a" * 101, "larger than the limit of 100 bytes"),
        ("data:;base64," + "a" * 304, "larger than the limit of 100 bytes"),
        ("ftp://example.org/a.png", "does not begin with data:, file: or http"),
        ("http://127.0.0.1:1/a.png", "'127.0.0.1' is not on the list of allowed hosts"),
        ("http://[half", "not on the list of allowed hosts"),
        ("file:a.png", "no such file is offered"),
    ],
)
def test_urls_that_are_refused(url: str, message: str):
    with pytest.raises(MediaError, match=f"cannot read it: .*{message}"):
        open_url(url, "it", Access(max_bytes=100))


def test_files_below_an_allowed_folder(tmp_path: Path):
    offered, secret = tmp_path / "offered", tmp_path / "secret.png"
    offered.mkdir()
    for path in (secret, offered / "a b.png"):
        path.write_bytes(b"x")
    (offered / "link.png").symlink_to(secret)
    access = Access(folders=(offered,))
    for url in ("file:a%20b.png", f"file://{offered}/a%20b.png", f"file://localhost{offered}/a b.png"):
        assert open_url(url, "it", access) == offered / "a b.png"
    for url in ("file:../secret.png", f"file://{secret}", "file:link.png", "file:.", "file:b.png", "file:a\0"):
        with pytest.raises(MediaError, match="cannot read it: no such file is offered"):
            open_url(url, "it", access)
    assert open_url("file:../secret.png", "it", Access(own_folder=offered)).samefile(secret)  # type: ignore[union-attr]


class Pages(BaseHTTPRequestHandler):
    """A small web: a picture, pages that lead elsewhere, a large one, a slow one."""

    def do_GET(self) -> None:
        leads = {"/to-picture": "/picture", "/round": "/round", "/away": "http://localhost:1/", "/to-file": "file:///x"}
        if self.path in leads:
            self.send_response(302)
            self.send_header("Location", leads[self.path])
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            for _ in range(200 if self.path == "/slow" else 1):
                self.wfile.write(b"a" * 1000 if self.path == "/large" else b"a")
                self.wfile.flush()
                time.sleep(0.05 if self.path == "/slow" else 0)

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_urls_of_an_allowed_host_are_fetched(web: str):
    access = Access(hosts=("127.0.0.1",), max_bytes=100, seconds=0.5)
    assert open_url(f"{web}/to-picture", "it", access) == b"a"
    refused = {
        "/away": "'localhost' is not on the list",
        "/to-file": "UnsupportedProtocol|not on the list",
        "/round": "TooManyRedirects",
        "/missing": "status 404",
        "/large": "larger than the limit",
        "/slow": "longer than 0.5 s",
    }
    for path, message in refused.items():
        with pytest.raises(MediaError, match=message):
            open_url(f"{web}{path}", "it", access)
