"""The server's parts without a model: which addresses are fetched, settings, tokens, metrics."""

from __future__ import annotations

import argparse
import io
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lavis_chatbridge.chat.server import attachments, command, fetch
from lavis_chatbridge.chat.server.errors import RequestError
from lavis_chatbridge.chat.server.folder import RequestFolder
from lavis_chatbridge.chat.server.metrics import Metrics
from lavis_chatbridge.chat.server.requests import Attachment, read_request
from lavis_chatbridge.chat.server.settings import ServerSettings
from lavis_chatbridge.config import checked
from lavis_chatbridge.errors import ConfigError

PRIVATE = {
    "this machine": ("127.0.0.1", "127.8.8.8", "0.0.0.0", "::1", "::"),
    "a local net": ("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fd12::1", "fec0::1"),
    "this link": ("169.254.169.254", "fe80::1", "fe80::1%eth0"),
    "a provider's net": ("100.64.0.1",),
    "many machines": ("224.0.0.1", "255.255.255.255", "ff02::1"),
    "nobody": ("240.0.0.1", "192.0.2.1", "198.18.0.1", "2001:db8::1", "nonsense"),
    "one inside another": ("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::"),
}


USER = {"role": "user", "content": "hi"}
OTHER = {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the request's body is a JSON object"),
        ({"messages": [{"role": "user", "content": ""}]}, r"messages\[0\] is empty"),
        ({"messages": [USER, OTHER, {"role": "user", "content": " \n"}]}, r"messages\[2\] is empty"),
        ({"messages": [OTHER, USER]}, "begins with a message of the user"),
        ({"messages": [USER, OTHER]}, "the last message is the user's"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "in front of all others"),
        (
            {
                "messages": [
                    {"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]},
                    USER,
                ]
            },
            "only the user's messages bring media",
        ),
        ({"messages": [USER], "stop": ["x" * 101]}, "longer than 100"),
    ],
)
def test_refusals_without_a_code(body: Any, message: str):
    """Those of docs/server.md's table."""
    with pytest.raises(RequestError, match=message) as refused:
        read_request({"model": "m", **body} if isinstance(body, dict) else body, 8, 4)
    assert (refused.value.status, refused.value.code) == (400, None)


def test_what_was_found_is_named():
    with pytest.raises(RequestError, match="response_format = an object of 1 is not supported") as refused:
        read_request({"model": "m", "messages": [USER], "response_format": {"type": "json_object"}}, 8, 4)
    assert refused.value.code == "unsupported_parameter"
    with pytest.raises(RequestError, match="messages is an object of 0, expected a list"):
        read_request({"model": "m", "messages": {}}, 8, 4)


@pytest.mark.parametrize("kind", PRIVATE, ids=lambda name: name.replace(" ", "-"))
def test_addresses_that_are_not_public(kind: str):
    assert [address for address in PRIVATE[kind] if fetch.is_public(address)] == []


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_are_public(address: str):
    assert fetch.is_public(address)


class Pages(BaseHTTPRequestHandler):
    """A small web: a picture, pages that lead elsewhere, a large one, a slow one."""

    def do_GET(self) -> None:
        leads = {"/to-picture": "/picture", "/round": "/round", "/to-metadata": "http://169.254.169.254/secret"}
        leads["/to-file"] = "file:///etc/passwd"
        path = self.path.partition("?")[0]
        if path in leads:
            self.send_response(302)
            self.send_header("Location", leads[path])
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            if self.path == "/slow":
                for _ in range(1200):
                    self.wfile.write(b"a")
                    self.wfile.flush()
                    time.sleep(0.05)
            else:
                self.wfile.write(b"picture" if self.path == "/picture" else b"a" * 100_000)

    def log_message(self, *told: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def web() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names lead to this machine, which counts as public here; the names that were asked for."""
    names: list[str] = []
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **more: Any) -> Any:
        names.append(host)
        return real("127.0.0.1" if host.endswith(".test") else host, *args, **more)

    public = fetch.is_public
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1" or public(address))
    return names


def got(url: str, limit: int = 1000, seconds: float = 90.0) -> bytes:
    file = io.BytesIO()
    fetch.fetch(url, file, limit, time.monotonic() + seconds)
    return file.getvalue()


def test_a_public_url_is_fetched(web: int, resolved: list[str]):
    assert got(f"http://pictures.test:{web}/picture") == b"picture"
    assert got(f"http://pictures.test:{web}/to-picture?a=b#c") == b"picture"
    # A name is asked for once for each page: what was checked is where the connection goes.
    assert resolved.count("pictures.test") == 3


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/to-metadata", "not a public one"),
        ("/to-file", "only http and https"),
        ("/round", "more than 3 others"),
        ("/missing", "status 404"),
    ],
)
def test_where_a_page_leads_is_checked_too(web: int, resolved: list[str], path: str, told: str):
    with pytest.raises(fetch.FetchError, match=told):
        got(f"http://pictures.test:{web}{path}")


def test_large_and_slow_pages_are_given_up(web: int, resolved: list[str]):
    with pytest.raises(fetch.TooLargeError):
        got(f"http://pictures.test:{web}/large")
    began = time.monotonic()
    with pytest.raises(fetch.TooSlowError):
        got(f"http://pictures.test:{web}/slow", seconds=0.4)
    assert time.monotonic() - began < 30


def test_private_urls_are_refused(web: int, monkeypatch: pytest.MonkeyPatch):
    for host in (f"127.0.0.1:{web}", f"localhost:{web}", f"[::1]:{web}", f"2130706433:{web}", f"0x7f.1:{web}"):
        with pytest.raises(fetch.FetchError, match=r"not a public one|no address"):
            got(f"http://{host}/picture")
    # A name with a public and a private address may lead to either.
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: both)
    with pytest.raises(fetch.FetchError, match="not a public one"):
        got("http://both.test/picture")
    for url in ("http://me:word@both.test/", "gopher://both.test/", "http://", "http://[/"):
        with pytest.raises(fetch.FetchError):
            got(url)


def test_files_below_a_folder_only(tmp_path: Path):
    offered = tmp_path / "offered"
    (offered / "in").mkdir(parents=True)
    (offered / "in" / "a b.txt").write_bytes(b"inside")
    (tmp_path / "offered-not").mkdir()
    (tmp_path / "offered-not" / "c.txt").write_bytes(b"outside")
    settings = ServerSettings(folders=(offered,), max_medium=6)

    def saved(url: str) -> bytes:
        folder = RequestFolder(tmp_path)
        (path,) = attachments.save([Attachment("image", url, where="x")], folder, settings, time.monotonic() + 9)
        return path.read_bytes()

    assert saved("file:in/a%20b.txt") == b"inside"
    assert saved(f"file://localhost{offered}/in/../in/a b.txt") == b"inside"
    outside = (f"file://{tmp_path}/offered-not/c.txt", "file:../offered-not/c.txt", "file://elsewhere/in/a b.txt")
    for url in (*outside, "file:in", "file:", "file:in/%00", "file:in/a%20b.txt?x"):
        with pytest.raises(RequestError) as refused:
            saved(url)
        assert refused.value.message == "x: this server offers no such file"
    (offered / "long.txt").write_bytes(b"seven b")
    with pytest.raises(RequestError) as refused:
        saved("file:long.txt")
    assert refused.value.status == 413
    with pytest.raises(RequestError, match="fetches no URLs"):
        saved("https://example.org/a.png")


def test_settings_tell_all_faults_together(tmp_path: Path):
    with pytest.raises(ConfigError) as faults:
        checked(ServerSettings(host="0.0.0.0", queue=0, timeout=0, decode_memory=1, folders=(tmp_path / "none",)))
    for part in ("decode_memory", "queue", "timeout", "no folder", "give tokens"):
        assert part in str(faults.value)
    checked(ServerSettings(host="0.0.0.0", tokens=("a",)))
    assert "localhost" in ServerSettings().host_names
    assert ServerSettings(tokens=("a",)).host_names == frozenset()


def test_the_command_reads_tokens_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tokens").write_text("# for tests\none\n\ntwo\n")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    monkeypatch.setenv(command.TOKENS, "zero")
    given = [
        "--model",
        "some/my.yaml",
        "--token-file",
        str(tmp_path / "tokens"),
        "--max-body",
        "0.5",
        "--decode-memory",
        "64",
    ]
    settings = command.settings_of(parser.parse_args(given))
    assert settings.tokens == ("zero", "one", "two")
    assert settings.name == "chatbridge-my"
    assert settings.max_body == 1 << 19
    assert settings.decode_memory == 1 << 26
    (tmp_path / "empty").write_text("")
    monkeypatch.delenv(command.TOKENS)
    with pytest.raises(ConfigError, match="holds no token"):
        command.settings_of(parser.parse_args(["--token-file", str(tmp_path / "empty")]))


def test_a_port_that_is_taken_is_told():
    with command.listen("127.0.0.1", 0) as line:
        line.listen()
        with pytest.raises(ConfigError, match="cannot listen"):
            command.listen("127.0.0.1", line.getsockname()[1])


def test_metrics_are_prometheus_text():
    metrics = Metrics()
    metrics.describe(asked="Questions.")
    metrics.count("asked", status=200)
    metrics.count("asked", 12_345_678, status=200)
    metrics.time("taken", 0.3)
    metrics.time("taken", 500)
    metrics.gauge("waiting", "Who waits.", lambda: 3)
    lines = metrics.text().splitlines()
    for line in ("# HELP asked Questions.", 'asked{status="200"} 12345679', "waiting 3", "taken_count 2"):
        assert line in lines
    assert 'taken_bucket{le="0.25"} 0' in lines
    assert 'taken_bucket{le="0.5"} 1' in lines
    assert 'taken_bucket{le="+Inf"} 2' in lines
    assert "taken_sum 500.300000" in lines


def test_escapes_are_undone_a_stretch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 3
    escaped = "".join(f"%{byte:02x}" for byte in content)
    for stretch in (3, 4, 7, 1000):
        monkeypatch.setattr(attachments, "_STRETCH", stretch)
        assert attachments._unescaped(escaped) == content
        assert attachments._unescaped("%%41%4%zz\u00e9%") == urllib.parse.unquote_to_bytes("%%41%4%zz\u00e9%")


def test_what_is_no_address_or_no_unicode_is_refused(tmp_path: Path) -> None:
    settings = ServerSettings(folders=(tmp_path,))
    for url in ("file://[::1", "file:///\ud800", "data:;base64,\ud800"):
        place = RequestFolder(tmp_path)
        with pytest.raises(RequestError):
            attachments.save([Attachment("image", url=url, where="w")], place, settings, float("inf"))
        place.close()
