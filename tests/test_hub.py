"""Weights by name, against a server on loopback that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from lavis_chatbridge import hub
from lavis_chatbridge.errors import CheckpointError
from tests.hub_server import HubServer, connect, serving, set_offline

BIG = os.urandom(3 << 20)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with a few repositories, an empty cache, and no folder of local files."""
    root = tmp_path / "hub"
    files: dict[str, bytes] = {
        "org/encoder/config.json": b"{}",
        "org/encoder/preprocessor_config.json": b"{} ",
        "org/encoder/model.safetensors": BIG,
        "org/encoder/pytorch_model.bin": b"the same in another format",
        "org/encoder/README.md": b"words",
        "org/encoder/sub/part.pth": b"part",
        "org/llm/config.json": b"{}",
        "org/llm/tokenizer.json": b"{}",
        "org/llm/model-1.safetensors": b"first",
        "org/llm/model-2.safetensors": b"second",
        "org/tok/tokenizer.json": b"{}",
        "org/shards/model-1.safetensors": b"first",
        "org/shards/model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}',
        "org/secret/config.json": b"{}",
        "org/empty/README.md": b"words",
    }
    index = {"weight_map": {"vision_model.a": "model-1.safetensors", "language_model.b": "model-2.safetensors"}}
    files["org/llm/model.safetensors.index.json"] = json.dumps(index).encode()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.delenv(hub.FOLDER, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with serving(root) as running:
        running.gated.add("org/secret")
        connect(running, tmp_path / "cache", monkeypatch)
        yield running


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name@v1.0", ("org/name", "", "v1.0")),
        ("org/name/sub/file.pth", ("org/name", "sub/file.pth", None)),
        ("org/name/file.pth@refs/pr/1", ("org/name", "file.pth", "refs/pr/1")),
        *((path, ("", "", None)) for path in ("weights/eva.pth", "/a/b", "./a/b", "~/a", "$DIR/a/b", "package:assets")),
        ("http://a.org/b", ("", "", None)),
    ],
)
def test_hub_ids_and_paths(text: str, parts: tuple) -> None:
    name = hub.parsed(text)
    assert (name.repo, name.file, name.revision) == parts
    assert (name.path is None) == bool(name.repo)


def test_only_needed_files_are_fetched_and_then_cached(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hub.status("org/encoder", "it")
    assert (found.state, found.size) == ("to fetch", len(BIG) + 5)
    folder = hub.find("org/encoder", "it")
    assert sorted(server.downloads()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert (folder / "model.safetensors").read_bytes() == BIG
    set_offline(True, monkeypatch)
    server.requests.clear()
    assert hub.find("org/encoder", "it") == folder
    assert hub.status("org/encoder", "it")[:3] == ("cached", folder, len(BIG) + 5)
    assert server.requests == []


def test_files_that_another_program_fetched_are_found(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as ``hf download org/encoder --include ...``; huggingface_hub 2 records what such a download left out."""
    huggingface_hub.snapshot_download("org/encoder", allow_patterns=["*.json", "*.safetensors"])
    set_offline(True, monkeypatch)
    assert (hub.find("org/encoder", "it") / "model.safetensors").read_bytes() == BIG


def test_only_the_tokenizer_or_the_shards_with_the_wanted_tensors_are_fetched(server: HubServer) -> None:
    folder = hub.find("org/llm", "it", "tokenizer")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    hub.find("org/llm", "it", prefixes=("vision_model.",))
    assert [path.name for path in folder.glob("*.safetensors")] == ["model-1.safetensors"]
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors missing in"):
        hub.require_files(folder, "weights")
    with pytest.raises(CheckpointError, match=r"absent does not exist$"):
        hub.require_files(folder / "absent", "weights")
    assert hub.status("org/llm", "it", "language_model").state == "to fetch"
    hub.find("org/llm", "it", "language_model")
    assert server.downloads().count("model-1.safetensors") == 1
    assert (folder / "model-2.safetensors").is_file()


@pytest.mark.skipif(huggingface_hub.__version__ < "1", reason="huggingface_hub 0.x does not resume by itself")
@pytest.mark.parametrize("address", [False, True])
def test_a_broken_connection_is_resumed(server: HubServer, monkeypatch: pytest.MonkeyPatch, address: bool) -> None:
    server.broken.add("model.safetensors")
    name = f"{server.url}/cdn/org/encoder/model.safetensors" if address else "org/encoder/model.safetensors"
    assert hub.find(name, "it").read_bytes() == BIG
    ranges = [wanted for method, path, wanted in server.requests if method == "GET" and path.startswith("/cdn/")]
    assert ranges[0] == ""
    assert int(ranges[1].removeprefix("bytes=").removesuffix("-")) > 0
    set_offline(True, monkeypatch)
    assert hub.find(name, "it").read_bytes() == BIG


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/secret", r"org/secret \(http.*/org/secret\) is gated \(403\): accept its terms .* set HF_TOKEN"),
        ("org/nobody", r"http.*/org/nobody\) does not exist or is private \(401/404\): check the name"),
        ("org/encoder@v9", r"does not have the revision 'v9' \(404\)"),
        ("org/empty", "does not contain weights"),
        ("org/empty/no/file", "does not contain no/file"),
        ("URL/none.pth", r"http.*/none\.pth cannot be fetched \(.*404.*try again, or put it into"),
        ("weights/none.pth", r"^it: weights/none\.pth does not exist$"),
        ("org/na--me", r"^it: org/na--me \(http.*\) is neither a path that exists nor a hub id: "),
        ("$NO_SUCH_VARIABLE/a.pth", "the environment variable NO_SUCH_VARIABLE is not set"),
    ],
)
def test_refusals_are_one_line_with_address_and_remedy(server: HubServer, name: str, words: str) -> None:
    name = name.replace("URL", server.url)
    with pytest.raises(CheckpointError, match=words) as caught:
        hub.find(name, "it")
    assert "\n" not in str(caught.value)
    found = hub.status(name, "it")
    assert found.state == "missing"
    assert found.fault == str(caught.value)


def test_a_repository_without_configuration_is_cached(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [hub.find("org/tok", "it", "tokenizer"), hub.find("org/shards", "it")]
    set_offline(True, monkeypatch)
    assert [hub.find("org/tok", "it", "tokenizer"), hub.find("org/shards", "it")] == found


@pytest.mark.parametrize("name", ["org/encoder", "https://example.org/a.pth"])
def test_offline(server: HubServer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_offline(True, monkeypatch)
    with pytest.raises(
        CheckpointError, match=r"is not on this disk and HF_HUB_OFFLINE is set: unset it.*\$CHATBRIDGE_WEIGHTS"
    ):
        hub.find(name, "it")
    assert server.requests == []


def test_alternatives(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["$CHATBRIDGE_WEIGHTS/part.pth", "org/nobody", "org/encoder/sub/part.pth@main"]
    assert hub.find(names, "it").read_bytes() == b"part"
    assert server.downloads() == ["part.pth"]
    assert hub.status(names[2:], "it").state == "cached"
    with pytest.raises(CheckpointError, match=r"^it: .*part\.pth does not exist.*; org/nobody "):
        hub.find(names[:2], "it")
    monkeypatch.setenv("CHATBRIDGE_WEIGHTS", str(tmp_path))
    (tmp_path / "part.pth").write_bytes(b"mine")
    assert hub.find(names, "it") == tmp_path / "part.pth"
    assert hub.find(names[2:], "it") == tmp_path / "part.pth"  # a local copy comes before the cached one
    assert hub.status(names[2:], "it").state == "local"
    (tmp_path / "encoder").mkdir()
    assert hub.find("org/encoder", "it") == tmp_path / "encoder"


def test_free_disk_is_checked_before_anything_is_fetched(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 8, 1000))
    for name in ("org/encoder", f"{server.url}/cdn/org/encoder/model.safetensors"):
        with pytest.raises(CheckpointError, match=r"takes 3\.00MB, but .* has 0\.98kB free: make room, or set HF_HOME"):
            hub.find(name, "it")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_one_process_fetches_while_the_others_wait(server: HubServer, tmp_path: Path) -> None:
    code = "from lavis_chatbridge import hub; print(hub.find('org/encoder', 'it'))"
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **home}, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    places = {process.communicate(timeout=120)[0] for process in started}
    assert len(places) == 1
    assert [process.returncode for process in started] == [0, 0, 0]
    assert server.downloads().count("model.safetensors") == 1
