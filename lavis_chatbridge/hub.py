"""Finds weights by name (a path, a hub id, a URL, or a list of these), and downloads them if necessary.

Names, wherever a configuration accepts weights::

    /models/eva.pth   $DIR/eva.pth   ~/eva.pth   package:assets/tiny/llm
    org/name          org/name@revision          org/name/file          org/name/file@revision
    https://host/path/file.pth

Local files come first: a path, a copy in the folder ``CHATBRIDGE_WEIGHTS``, a cached download. If there is none, the
first name of the list that can be downloaded is used. This module imports no model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlparse

from tqdm import tqdm

from lavis_chatbridge.errors import CheckpointError, one_line
from lavis_chatbridge.files import atomic_file, locked

T = TypeVar("T")

Content = Literal["weights", "language_model", "tokenizer", "processor"]
"""The required files of a folder: weights, weights and tokenizer, only the tokenizer, or only the configurations."""

PACKAGE = "package:"
FOLDER = "CHATBRIDGE_WEIGHTS"
_HUB_ID = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[^@]+))?")
_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".ckpt", ".yaml")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}
_TOKENIZER = (
    *sorted(_VOCABULARIES), "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "merges.txt", "spiece.model",
)  # fmt: skip
_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json")


class Name(NamedTuple):
    """A parsed name of weights, and the required files; exactly one of ``path``, ``repo`` and ``url`` is set."""

    text: str
    content: Content = "weights"
    prefixes: tuple[str, ...] = ()
    path: Path | None = None
    repo: str = ""
    file: str = ""
    revision: str | None = None
    url: str = ""

    @property
    def last(self) -> str:
        """The last part of the file's or repository's name."""
        return Path(urlparse(self.url).path or self.file or self.repo).name

    @property
    def address(self) -> str:
        """The URL of the file or repository."""
        from huggingface_hub import constants

        return self.url or f"{constants.ENDPOINT}/{self.repo}"


class Found(NamedTuple):
    """The location of weights; ``size`` is in bytes, None if unknown."""

    state: Literal["local", "cached", "to fetch", "missing"]
    path: Path | None = None
    size: int | None = None
    fault: str = ""


def find(names: str | Sequence[str], what: str, content: Content = "weights", prefixes: Sequence[str] = ()) -> Path:
    """The local file or folder of weights (a name, or alternatives), downloaded if necessary.

    With ``prefixes`` of tensors' names, only the shards with such tensors are downloaded.

    Raises:
        CheckpointError: If no name works; one line with the setting (``what``), the file, its URL and a remedy.
    """
    alternatives = [parsed(text, content, prefixes) for text in as_list(names)]
    for name in alternatives:
        if (path := _local(name) or _cached(name)) is not None:
            return path
    return _first(alternatives, what, _fetch)


def status(names: str | Sequence[str], what: str, content: Content = "weights", prefixes: Sequence[str] = ()) -> Found:
    """The location of weights, without a download; requests their size from the server. Arguments as in `find`."""
    alternatives = [parsed(text, content, prefixes) for text in as_list(names)]
    try:
        for name in alternatives:
            local = _local(name)
            if (path := local or _cached(name)) is not None:
                files = [path] if path.is_file() else require_files(path, content, prefixes)
                return Found("local" if local else "cached", path, sum(file.stat().st_size for file in files))
        sizes = _first(alternatives, what, _remote_sizes)
        return Found("to fetch", size=sum(sizes.values()) or None)
    except CheckpointError as error:
        return Found("missing", fault=str(error))


def snapshot(repo: str, revision: str | None = None) -> Path:
    """Download all files of a hub repository and return the local folder; raises as `find`."""
    from huggingface_hub import snapshot_download

    return Path(_ask(Name(repo, repo=repo, revision=revision), lambda: snapshot_download(repo, revision=revision)))


def as_list(names: str | Sequence[str]) -> list[str]:
    """One name or alternatives as a list."""
    return [names] if isinstance(names, str) else list(names)


def parsed(text: str, content: Content = "weights", prefixes: Sequence[str] = ()) -> Name:
    """Parse a name."""
    name = Name(text, content, tuple(prefixes))
    if re.match(r"https://|http://(localhost|127\.0\.0\.1)[:/]", text):  # no unencrypted download from other hosts
        return name._replace(url=text)
    path = Path(os.path.expandvars(text)).expanduser()
    if text.startswith(PACKAGE):
        path = Path(__file__).resolve().parent / text[len(PACKAGE) :]
    found = _HUB_ID.fullmatch(text)
    if found is None or (not found["file"] and text.endswith(_SUFFIXES)) or path.exists():
        return name._replace(path=path)
    return name._replace(repo=found["repo"], file=found["file"] or "", revision=found["revision"])


def require_files(folder: Path, content: Content, prefixes: Sequence[str] = ()) -> list[Path]:
    """The required files of a folder in Hugging Face's layout; a `CheckpointError` if one is missing."""
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist")
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    required = _required(there, content, prefixes, str(folder), folder.joinpath)
    if missing := [name for name in required if name not in there]:
        raise CheckpointError(f"{', '.join(missing[:4])} missing in {folder}: download the folder again")
    return [folder / name for name in required]


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object from a folder; a `CheckpointError` if it cannot be read."""
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {one_line(error)}") from error


def image_size(preprocessor: dict[str, Any]) -> int | None:
    """An image's side in pixels, from a ``preprocessor_config.json``; None if there is no size."""
    for key in ("crop_size", "size"):
        size = preprocessor.get(key)
        if isinstance(size, int):
            return size
        if isinstance(size, dict) and (side := size.get("height") or size.get("shortest_edge")):
            return int(side)
    return None


def _first(alternatives: Sequence[Name], what: str, attempt: Callable[[Name], T]) -> T:
    """The result of ``attempt`` for the first name that works; the error lists the faults of all names."""
    faults = []
    for name in alternatives:
        try:
            return attempt(name)
        except CheckpointError as error:
            faults.append(str(error))
    raise CheckpointError(f"{what}: {'; '.join(faults)}")


def _required(
    there: Collection[str], content: Content, prefixes: Sequence[str], where: str, index_at: Callable[[str], Path]
) -> list[str]:
    """The required names of ``there``; prefers safetensors to torch's format, and one file to shards."""
    chosen = [name for name in _CONFIGS if name in there]
    if content in ("language_model", "tokenizer"):
        chosen += [name for name in _TOKENIZER if name in there]
    if content == "tokenizer" and not _VOCABULARIES & set(there):
        raise CheckpointError(f"{where} does not contain a tokenizer (tokenizer.json or tokenizer.model)")
    if content == "processor" and not chosen:
        raise CheckpointError(f"{where} does not contain config.json")
    if content in ("tokenizer", "processor"):
        return chosen
    for single in _SINGLE:
        if single in there:
            return [*chosen, single]
        if (index := f"{single}.index.json") in there:
            shard_of = read_config(index_at(index).parent, index).get("weight_map") or {}
            shards = {shard_of[name] for name in shard_of if not prefixes or name.startswith(tuple(prefixes))}
            return [*chosen, index, *sorted(shards)]
    raise CheckpointError(f"{where} does not contain weights ({' or '.join(_SINGLE)}, or shards of them with an index)")


def _local(name: Name) -> Path | None:
    """An existing path, or a copy in the folder of ``CHATBRIDGE_WEIGHTS``.

    The copy is ``org/name/file``, ``name/file``, ``name`` or only the file.
    """
    if name.path is not None:
        return name.path if name.path.exists() else None
    if not (folder := os.environ.get(FOLDER)):
        return None
    repo = Path(name.repo)
    copies = [repo / name.file, Path(repo.name) / name.file] if name.repo else []
    paths = (Path(folder).expanduser() / copy for copy in [*copies, Path(name.last)])
    return next((path for path in paths if path.exists()), None)


def _cached(name: Name) -> Path | None:
    """The file or complete folder of an earlier download."""
    from huggingface_hub import errors, try_to_load_from_cache

    if not name.repo:
        return path if name.url and (path := _url_path(name.url)).is_file() else None
    indexes = [f"{single}.index.json" for single in _SINGLE]
    files = [name.file] if name.file else [*_CONFIGS, *_SINGLE, *indexes, *_TOKENIZER]
    try:
        cached = [try_to_load_from_cache(name.repo, file, revision=name.revision) for file in files]
        first = next((Path(path) for path in cached if isinstance(path, str)), None)
        if first is None or name.file:
            return first
        require_files(first.parent, name.content, name.prefixes)
    except (CheckpointError, errors.HFValidationError):  # incomplete, or no hub id: the download words it
        return None
    return first.parent


def _fetch(name: Name) -> Path:
    """Download in one process; others wait for its locks, and then use the cached files.

    huggingface_hub resumes after a broken connection.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get

    sizes, target = _remote_sizes(name), _url_path(name.url)
    folder = target.parent if name.url else Path(constants.HF_HUB_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    if (size := sum(sizes.values())) > (free := shutil.disk_usage(folder).free):
        raise CheckpointError(
            f"{name.text} takes {tqdm.format_sizeof(size, 'B', 1024)}, but {folder} has "
            f"{tqdm.format_sizeof(free, 'B', 1024)} free: make room, or set HF_HOME to a folder on another disk"
        )
    if name.repo:
        paths = [_download(name, file) for file in sizes]
        return paths[0] if name.file else paths[0].parent
    with locked(target):
        if not target.is_file():
            with atomic_file(target) as temporary, open(temporary, "wb") as file:
                uncompressed = {"Accept-Encoding": "identity"}
                _ask(name, lambda: http_get(name.url, file, headers=uncompressed, expected_size=size or None))
    return target


def _download(name: Name, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(_ask(name, lambda: hf_hub_download(name.repo, file, revision=name.revision)))


def _remote_sizes(name: Name) -> dict[str, int]:
    """The files to download -> their sizes in bytes, 0 if unknown."""
    from huggingface_hub import HfApi, get_hf_file_metadata

    if name.path is not None:
        unset = [variable for variable in re.findall(r"\$\{?(\w+)", name.text) if variable not in os.environ]
        because = "".join(f"; the environment variable {variable} is not set" for variable in unset)
        raise CheckpointError(f"{name.path} does not exist{because}")
    if name.url:
        return {name.url: _ask(name, lambda: get_hf_file_metadata(name.url, token=False).size) or 0}
    info = _ask(name, lambda: HfApi().model_info(name.repo, revision=name.revision, files_metadata=True))
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    required = [name.file]
    if not name.file:
        required = _required(sizes, name.content, name.prefixes, name.address, lambda i: _download(name, i))
    if missing := [file for file in required if file not in sizes]:
        raise CheckpointError(f"{name.text}: {name.address} does not contain {', '.join(missing[:4])}")
    return {file: sizes[file] for file in required}


def _url_path(url: str) -> Path:
    """The path that LAVIS's ``download_cached_file`` uses, so that its downloads are found."""
    import torch.hub

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def _ask(name: Name, request: Callable[[], T]) -> T:
    """The result of a request; an error names the file, its URL and a remedy."""
    from huggingface_hub import constants, errors

    try:
        return request()
    except (errors.OfflineModeIsEnabled, errors.HFValidationError, errors.HTTPError, OSError) as error:
        match error:
            case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
                no_answer = f"no server answers: {one_line(error)}"
                online = f"{no_answer}; run `chatbridge weights download` with a network"
                because = "HF_HUB_OFFLINE is set: unset it to download" if constants.HF_HUB_OFFLINE else online
                cause = f"is not on this disk and {because}"
            case errors.GatedRepoError():
                cause = "is gated (403): accept its terms at that address and set HF_TOKEN to your token"
            case errors.RepositoryNotFoundError():
                cause = "does not exist or is private (401/404): check the name, or set HF_TOKEN"
            case errors.RevisionNotFoundError():
                cause = f"does not have the revision {name.revision!r} (404)"
            case errors.HFValidationError():
                cause = f"is neither a path that exists nor a hub id: {one_line(error)}"
            case _:
                cause = f"cannot be fetched ({one_line(error)}); try again"
        what = name.url or f"{name.text} ({name.address})"
        raise CheckpointError(f"{what} {cause}, or put it into ${FOLDER}/{name.last}") from error
