"""Weights by name: a path, a hub id, an address, or a list of these becomes a file or folder on this disk.

Names, in any place where a configuration accepts weights::

    /models/eva.pth   $DIR/eva.pth   ~/eva.pth   package:assets/tiny/llm
    org/name          org/name@revision          org/name/file          org/name/file@revision
    https://host/path/file.pth

Files on this disk come first: a local path, a copy under ``CHATBRIDGE_WEIGHTS``, a cached download. If there is none,
the first name of the list that can be fetched is fetched. This module knows no model.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlparse

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.files import atomic_file, locked

log = logging.getLogger(__name__)

Content = Literal["weights", "language_model", "tokenizer", "processor"]
"""The files that are needed of a folder: an encoder's or a bridge's weights, or the rest with or without them."""

PACKAGE = "package:"
FOLDER = "CHATBRIDGE_WEIGHTS"
_HUB_ID = re.compile(
    r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<before>[^/@]+))?(?:/(?P<file>[^@]+))?(?:@(?P<after>[^@]+))?"
)
_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".ckpt", ".yaml")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
)  # fmt: skip
_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json")


class Name(NamedTuple):
    """One way to name weights; exactly one of ``path``, ``repo`` and ``url`` is set."""

    text: str
    path: Path | None = None
    repo: str = ""
    file: str = ""
    revision: str | None = None
    url: str = ""


class Found(NamedTuple):
    """Where weights are: ``state`` is local, cached, to fetch, or missing; ``size`` in bytes, None if unknown."""

    state: Literal["local", "cached", "to fetch", "missing"]
    place: Path | None
    size: int | None
    fault: str = ""


def find(
    names: str | Sequence[str], what: str, content: Content = "weights", prefixes: Sequence[str] = (), hint: str = ""
) -> Path:
    """The local file or folder of weights, which are fetched if they are not on this disk.

    Args:
        names: A name, or alternatives.
        what: The setting, for messages.
        content: The files that are needed of a folder.
        prefixes: Beginnings of the tensors' names that are needed; of a sharded model only their shards are fetched.
        hint: How to get the file, for messages.

    Raises:
        CheckpointError: One line with the file, its address and a remedy, if no name can be had.
    """
    faults = []
    alternatives = [parsed(text, what) for text in as_list(names)]
    for name in alternatives:
        if (place := _present(name, content, prefixes)) is not None:
            return place
    for name in alternatives:
        try:
            return _local_only(name) if name.path is not None else _fetched_once(name, content, prefixes)
        except CheckpointError as error:
            faults.append(str(error))
    raise CheckpointError(f"{what}: {'; '.join(faults)}" + (f" ({hint})" if hint else ""))


def status(
    names: str | Sequence[str], what: str, content: Content = "weights", prefixes: Sequence[str] = (), hint: str = ""
) -> Found:
    """Where weights are, without fetching them; a server is asked for their size."""
    try:
        alternatives = [parsed(text, what) for text in as_list(names)]
    except CheckpointError as error:
        return Found("missing", None, None, str(error))
    for name in alternatives:
        if (place := _present(name, content, prefixes)) is not None:
            own = [place] if place.is_file() else needed_files(place, content, prefixes)
            cached = name.path is None and _under_folder(name) is None
            return Found("cached" if cached else "local", place, sum(file.stat().st_size for file in own))
    faults = []
    for name in alternatives:
        try:
            if name.path is not None:
                _local_only(name)
            size = _url_size(name) if name.url else sum(size for _, size in _remote_files(name, content, prefixes))
            return Found("to fetch", None, size)
        except CheckpointError as error:
            faults.append(str(error))
    return Found("missing", None, None, f"{what}: {'; '.join(faults)}" + (f" ({hint})" if hint else ""))


def snapshot(repo: str, revision: str | None = None) -> Path:
    """The local folder of a hub's repository, all of whose files are fetched.

    Raises:
        CheckpointError: One line with the address and a remedy, if it cannot be had.
    """
    from huggingface_hub import snapshot_download

    name = Name(repo, repo=repo, revision=revision)
    return Path(_asking(name, partial(snapshot_download, repo, revision=revision)))


def as_list(names: str | Sequence[str]) -> list[str]:
    """One name or alternatives as a list."""
    return [names] if isinstance(names, str) else list(names)


def parsed(text: str, what: str) -> Name:
    """A name's parts.

    Raises:
        CheckpointError: If it is empty, or an address without TLS on another host.
    """
    if not text.strip():
        raise CheckpointError(f"{what} is empty: name a file, a hub id or an address, or set it to null")
    if re.match(r"https?://", text):
        if text.startswith("http://") and urlparse(text).hostname not in ("localhost", "127.0.0.1"):
            raise CheckpointError(f"{what}: {text} is not encrypted: use https://")
        return Name(text, url=text)
    found = _HUB_ID.fullmatch(text)
    file_like = found is not None and not found["file"] and text.endswith(_SUFFIXES)
    if found is None or file_like or os.path.exists(_expanded(text)):
        return Name(text, path=_expanded(text))
    return Name(text, repo=found["repo"], file=found["file"] or "", revision=found["before"] or found["after"])


def needed_files(folder: Path, content: Content, prefixes: Sequence[str] = ()) -> list[Path]:
    """The files of a folder in Hugging Face's layout that loading reads.

    Raises:
        CheckpointError: If one of them is missing.
    """
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    chosen = _chosen(there, content, lambda index: folder / index, prefixes, str(folder))
    if missing := [name for name in chosen if name not in there]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:4])}: download the folder again")
    return [folder / name for name in chosen]


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object of a folder.

    Raises:
        CheckpointError: If it is missing or no JSON object.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / name} holds no JSON object")
    return content


def image_size(preprocessor: dict[str, Any]) -> int | None:
    """Side of a picture in pixels, of a ``preprocessor_config.json``; None if it names none."""
    for key in ("crop_size", "size"):
        size = preprocessor.get(key)
        if isinstance(size, int):
            return size
        if isinstance(size, dict) and (side := size.get("height") or size.get("shortest_edge")):
            return int(side)
    return None


def _chosen(
    there: Iterable[str], content: Content, index_at: Callable[[str], Path], prefixes: Sequence[str], where: str
) -> list[str]:
    """The names among ``there`` that are needed; safetensors before torch's format, one file before shards."""
    names = set(there)
    chosen = [name for name in _CONFIGS if name in names]
    if content in ("language_model", "tokenizer"):
        if content == "tokenizer" and not {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"} & names:
            raise CheckpointError(f"{where} holds no tokenizer (tokenizer.json or tokenizer.model)")
        chosen += [name for name in _TOKENIZER if name in names]
    if content == "processor" and not chosen:
        raise CheckpointError(f"{where} has no config.json")
    if content in ("tokenizer", "processor"):
        return chosen
    for whole in _WHOLE:
        if whole in names:
            return [*chosen, whole]
        if (index := f"{whole}.index.json") in names:
            return [*chosen, index, *_shards(index_at(index), prefixes)]
    raise CheckpointError(f"{where} holds no weights ({' or '.join(_WHOLE)}, or shards of them with an index)")


def _shards(index: Path, prefixes: Sequence[str]) -> list[str]:
    """The shards that hold tensors with these prefixes, all without prefixes."""
    places = read_config(index.parent, index.name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} names no files (weight_map)")
    return sorted({file for name, file in places.items() if not prefixes or name.startswith(tuple(prefixes))})


def _expanded(text: str) -> Path:
    if text.startswith(PACKAGE):
        return Path(__file__).resolve().parent / text[len(PACKAGE) :]
    return Path(os.path.expandvars(text)).expanduser()


def _local_only(name: Name) -> Path:
    """Refuse a local path, which is not there."""
    unset = [variable for variable in re.findall(r"\$\{?(\w+)", name.text) if variable not in os.environ]
    because = "".join(f"; the environment variable {variable} is not set" for variable in unset)
    raise CheckpointError(f"{name.path} does not exist{because}")


def _present(name: Name, content: Content, prefixes: Sequence[str]) -> Path | None:
    """The local file or folder of a name, None if it is not on this disk."""
    if name.path is not None:
        return name.path if os.path.exists(name.path) else None
    if (own := _under_folder(name)) is not None:
        return own
    if name.url:
        return path if (path := _url_path(name.url)).is_file() else None
    return _cached(name, content, prefixes)


def _under_folder(name: Name) -> Path | None:
    """A copy in the folder of ``CHATBRIDGE_WEIGHTS``: ``org/name/file``, ``name/file``, ``name`` or the file alone."""
    if not (folder := os.environ.get(FOLDER)):
        return None
    if name.url:
        candidates = [Path(urlparse(name.url).path).name]
    else:
        inner = f"/{name.file}" if name.file else ""
        candidates = [name.repo + inner, name.repo.rpartition("/")[2] + inner]
        candidates += [Path(name.file).name] if name.file else []
    places = (Path(folder).expanduser() / candidate for candidate in candidates)
    return next((place for place in places if os.path.exists(place)), None)


def _cached(name: Name, content: Content, prefixes: Sequence[str]) -> Path | None:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        if name.file:
            found = try_to_load_from_cache(name.repo, name.file, revision=name.revision)
            return Path(found) if isinstance(found, str) else None
        folder = Path(snapshot_download(name.repo, revision=name.revision, local_files_only=True))
        needed_files(folder, content, prefixes)
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        return None
    return folder


def _fetched_once(name: Name, content: Content, prefixes: Sequence[str]) -> Path:
    """Fetch in one process; the others wait, then find the files cached."""
    from huggingface_hub import constants

    slug = re.sub(r"[^\w.-]+", "--", name.text)[-150:]
    with locked(Path(constants.HF_HUB_CACHE) / ".chatbridge" / slug):
        if (place := _present(name, content, prefixes)) is not None:
            return place
        return _fetch_url(name) if name.url else _fetch(name, content, prefixes)


def _fetch(name: Name, content: Content, prefixes: Sequence[str]) -> Path:
    from huggingface_hub import constants

    files = _remote_files(name, content, prefixes)
    _check_disk(Path(constants.HF_HUB_CACHE), sum(size for _, size in files), name.text)
    log.info("downloading %s: %s in %d files", name.text, in_words(sum(size for _, size in files)), len(files))
    place = Path()
    for file, _ in files:
        place = _download(name, file)
    return place if name.file else place.parents[files[-1][0].count("/")]


def _download(name: Name, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(_asking(name, partial(hf_hub_download, name.repo, file, revision=name.revision)))


def _remote_files(name: Name, content: Content, prefixes: Sequence[str]) -> list[tuple[str, int]]:
    """The files to fetch of a hub's repository, with their sizes in bytes."""
    from huggingface_hub import HfApi

    info = _asking(name, lambda: HfApi().model_info(name.repo, revision=name.revision, files_metadata=True))
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    if name.file:
        if name.file not in sizes:
            raise CheckpointError(f"{name.text}: {_address(name)} has no file {name.file}")
        return [(name.file, sizes[name.file])]
    chosen = _chosen(sizes, content, partial(_download, name), prefixes, f"{name.text} ({_address(name)})")
    return [(file, sizes.get(file, 0)) for file in chosen]


def _address(name: Name) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name.repo}"


def _asking(name: Name, ask: Callable[[], Any]) -> Any:
    """The answer of a hub.

    Raises:
        CheckpointError: One line with the file, its address and a remedy.
    """
    import httpx
    from huggingface_hub import constants, errors, file_download

    client = getattr(file_download, "httpx2", httpx)  # huggingface_hub's own
    what = name.url or f"{name.text} ({_address(name)})"
    put = f"or put {'it' if name.url else 'its files'} into ${FOLDER}/{name.repo.rpartition('/')[2]}"
    try:
        return ask()
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        unreachable = f"the server cannot be reached: {_one_line(error)}"
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable
        raise CheckpointError(
            f"{what} is not on this disk and {offline}; run `chatbridge weights download` with a network, {put}"
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{what} is gated (403): accept its terms at that address and set HF_TOKEN to your token, {put}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{what} does not exist or is private (401/404): check the name, or set HF_TOKEN, {put}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{what} has no revision {name.revision!r} (404)") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{name.text} is neither a path that exists nor a hub id: {_one_line(error)}") from error
    except (errors.HfHubHTTPError, OSError, httpx.HTTPError, client.HTTPError) as error:
        raise CheckpointError(f"{what} cannot be fetched ({_one_line(error)}); try again, {put}") from error


def _check_disk(folder: Path, size: int, what: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise CheckpointError(
            f"{what} takes {in_words(size)}, but {folder} has {in_words(free)} free: make room, or set HF_HOME to a "
            "folder on another disk"
        )


def _url_path(url: str) -> Path:
    """Where LAVIS's own ``download_cached_file`` keeps a file, so that its downloads are found."""
    cache = Path(os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch")
    return cache.expanduser() / "hub" / "checkpoints" / Path(urlparse(url).path).name


def _url_size(name: Name) -> int | None:
    import httpx
    from huggingface_hub import constants, errors

    def ask() -> int | None:
        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled
        answer = httpx.head(name.url, follow_redirects=True, timeout=30).raise_for_status()
        return int(answer.headers["content-length"]) if "content-length" in answer.headers else None

    return _asking(name, ask)


def _fetch_url(name: Name) -> Path:
    """Download a file; huggingface_hub resumes it after a broken connection."""
    from huggingface_hub.file_download import http_get

    target, size = _url_path(name.url), _url_size(name)
    _check_disk(target.parent, size or 0, name.url)
    with atomic_file(target) as temporary, open(temporary, "wb") as file:
        whole = {"Accept-Encoding": "identity"}
        _asking(name, lambda: http_get(name.url, file, headers=whole, expected_size=size))
    return target


def in_words(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
