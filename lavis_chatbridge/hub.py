"""Finds weights by name (a path, a hub id, a URL, or a list of these), and downloads them if necessary.

Names, wherever a configuration accepts weights::

    /models/eva.pth   $DIR/eva.pth   ~/eva.pth   package:assets/tiny/llm
    org/name          org/name@revision          org/name/file          org/name/file@revision
    https://host/path/file.pth

Local files come first: a path, a copy in the folder ``CHATBRIDGE_WEIGHTS``, a cached download. If there is none, the
first name of the list that can be downloaded is used. This module knows no model.
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
_WHOLE = ("model.safetensors", "pytorch_model.bin")
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
    path: Path | None
    size: int | None
    fault: str = ""


def find(names: str | Sequence[str], what: str, content: Content = "weights", prefixes: Sequence[str] = ()) -> Path:
    """The local file or folder of weights (a name, or alternatives), downloaded if necessary.

    With ``prefixes`` of tensors' names, only the shards with such tensors are downloaded.

    Raises:
        CheckpointError: If no name works; one line with the setting (``what``), the file, its URL and a remedy.
    """
    alternatives = [parsed(text, content, prefixes) for text in as_list(names)]
    for name in alternatives:
        if (path := _present(name)) is not None:
            return path
    return _first(alternatives, what, _fetch)


def status(names: str | Sequence[str], what: str, content: Content = "weights", prefixes: Sequence[str] = ()) -> Found:
    """The location of weights, without a download; requests their size from the server. Arguments as in `find`."""
    try:
        alternatives = [parsed(text, content, prefixes) for text in as_list(names)]
        for name in alternatives:
            if (path := _present(name)) is not None:
                files = [path] if path.is_file() else needed_files(path, content, prefixes)
                local = name.path is not None or _under_folder(name) is not None
                return Found("local" if local else "cached", path, sum(file.stat().st_size for file in files))
        return Found("to fetch", None, _first(alternatives, what, _remote_size))
    except CheckpointError as error:
        return Found("missing", None, None, str(error))


def snapshot(repo: str, revision: str | None = None) -> Path:
    """Download all files of a hub repository and return the local folder; raises as `find`."""
    from huggingface_hub import snapshot_download

    return Path(_ask(Name(repo, repo=repo, revision=revision), lambda: snapshot_download(repo, revision=revision)))


def as_list(names: str | Sequence[str]) -> list[str]:
    """One name or alternatives as a list."""
    return [names] if isinstance(names, str) else list(names)


def parsed(text: str, content: Content = "weights", prefixes: Sequence[str] = ()) -> Name:
    """Parse a name."""
    if re.match(r"https://|http://(localhost|127\.0\.0\.1)[:/]", text):  # no unencrypted download from other hosts
        return Name(text, content, tuple(prefixes), url=text)
    path = Path(os.path.expandvars(text)).expanduser()
    if text.startswith(PACKAGE):
        path = Path(__file__).resolve().parent / text[len(PACKAGE) :]
    found = _HUB_ID.fullmatch(text)
    if found is None or (not found["file"] and text.endswith(_SUFFIXES)) or path.exists():
        return Name(text, content, tuple(prefixes), path)
    return Name(text, content, tuple(prefixes), None, found["repo"], found["file"] or "", found["revision"])


def needed_files(folder: Path, content: Content, prefixes: Sequence[str] = ()) -> list[Path]:
    """The required files of a folder in Hugging Face's layout; a `CheckpointError` if one is missing."""
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist")
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    needed = _needed(there, content, lambda index: folder / index, prefixes, str(folder))
    if missing := [name for name in needed if name not in there]:
        raise CheckpointError(f"{', '.join(missing[:4])} missing in {folder}: download the folder again")
    return [folder / name for name in needed]


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
            if name.path is None:
                return attempt(name)
            unset = [variable for variable in re.findall(r"\$\{?(\w+)", name.text) if variable not in os.environ]
            because = "".join(f"; the environment variable {variable} is not set" for variable in unset)
            faults.append(f"{name.path} does not exist{because}")
        except CheckpointError as error:
            faults.append(str(error))
    raise CheckpointError(f"{what}: {'; '.join(faults)}")


def _needed(
    there: Collection[str], content: Content, index_at: Callable[[str], Path], prefixes: Sequence[str], where: str
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
    for whole in _WHOLE:
        if whole in there:
            return [*chosen, whole]
        if (index := f"{whole}.index.json") in there:
            return [*chosen, index, *_shards(index_at(index), prefixes)]
    raise CheckpointError(f"{where} does not contain weights ({' or '.join(_WHOLE)}, or shards of them with an index)")


def _shards(index: Path, prefixes: Sequence[str]) -> list[str]:
    """The shards with tensors of these prefixes; all shards if there are no prefixes."""
    weight_map = read_config(index.parent, index.name).get("weight_map") or {}
    return sorted({file for name, file in weight_map.items() if not prefixes or name.startswith(tuple(prefixes))})


def _present(name: Name) -> Path | None:
    """The local file or folder of a name; None if it does not exist."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if name.path is not None:
        return name.path if name.path.exists() else None
    if (own := _under_folder(name)) is not None:
        return own
    if name.url:
        return path if (path := _url_path(name.url)).is_file() else None
    try:
        if name.file:
            return Path(hf_hub_download(name.repo, name.file, revision=name.revision, local_files_only=True))
        folder = Path(snapshot_download(name.repo, revision=name.revision, local_files_only=True))
        needed_files(folder, name.content, name.prefixes)
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        return None
    return folder


def _under_folder(name: Name) -> Path | None:
    """A copy in the folder of ``CHATBRIDGE_WEIGHTS``: ``org/name/file``, ``name/file``, ``name`` or only the file."""
    if not (folder := os.environ.get(FOLDER)):
        return None
    repo = Path(name.repo)
    candidates = [repo / name.file, Path(repo.name) / name.file] if name.repo else []
    paths = (Path(folder).expanduser() / candidate for candidate in [*candidates, Path(name.last)])
    return next((path for path in paths if path.exists()), None)


def _fetch(name: Name) -> Path:
    """Download in one process; others wait for its locks, and then use the cached files."""
    from huggingface_hub import constants

    if name.url:
        return _fetch_url(name)
    sizes = _remote_files(name)
    _check_disk(Path(constants.HF_HUB_CACHE), sum(sizes.values()), name.text)
    paths = {file: _download(name, file) for file in sizes}
    return paths[name.file] if name.file else next(path.parents[file.count("/")] for file, path in paths.items())


def _download(name: Name, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(_ask(name, lambda: hf_hub_download(name.repo, file, revision=name.revision)))


def _fetch_url(name: Name) -> Path:
    """Download a file; huggingface_hub resumes it after a broken connection."""
    from huggingface_hub.file_download import http_get

    target, size = _url_path(name.url), _url_size(name)
    _check_disk(target.parent, size or 0, name.url)
    with locked(target):
        if not target.is_file():
            with atomic_file(target) as temporary, open(temporary, "wb") as file:
                whole = {"Accept-Encoding": "identity"}
                _ask(name, lambda: http_get(name.url, file, headers=whole, expected_size=size))
    return target


def _remote_size(name: Name) -> int | None:
    return _url_size(name) if name.url else sum(_remote_files(name).values())


def _remote_files(name: Name) -> dict[str, int]:
    """The files to download from a hub repository -> their sizes in bytes."""
    from huggingface_hub import HfApi

    info = _ask(name, lambda: HfApi().model_info(name.repo, revision=name.revision, files_metadata=True))
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    if name.file and name.file not in sizes:
        raise CheckpointError(f"{name.text}: {name.address} does not contain {name.file}")
    needed = [name.file]
    if not name.file:
        needed = _needed(sizes, name.content, lambda index: _download(name, index), name.prefixes, name.address)
    return {file: sizes.get(file, 0) for file in needed}


def _url_size(name: Name) -> int | None:
    from huggingface_hub import get_hf_file_metadata

    return _ask(name, lambda: get_hf_file_metadata(name.url, token=False).size)


def _url_path(url: str) -> Path:
    """The path that LAVIS's ``download_cached_file`` uses, so that its downloads are found."""
    import torch.hub

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def _check_disk(folder: Path, size: int, what: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise CheckpointError(
            f"{what} takes {tqdm.format_sizeof(size, 'B', 1024)}, but {folder} has "
            f"{tqdm.format_sizeof(free, 'B', 1024)} free: make room, or set HF_HOME to a folder on another disk"
        )


def _ask(name: Name, request: Callable[[], T]) -> T:
    """The result of a request; an error names the file, its URL and a remedy."""
    from huggingface_hub import errors

    try:
        return request()
    except (errors.OfflineModeIsEnabled, errors.HFValidationError, errors.HTTPError, OSError) as error:
        what = name.url or f"{name.text} ({name.address})"
        raise CheckpointError(f"{what} {_explained(error, name)}, or put it into ${FOLDER}/{name.last}") from error


def _explained(error: Exception, name: Name) -> str:
    """Text: the cause of an error, and a remedy."""
    from huggingface_hub import constants, errors

    match error:
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no server answers: {one_line(error)}"
            return f"is not on this disk and {offline}; run `chatbridge weights download` with a network"
        case errors.GatedRepoError():
            return "is gated (403): accept its terms at that address and set HF_TOKEN to your token"
        case errors.RepositoryNotFoundError():
            return "does not exist or is private (401/404): check the name, or set HF_TOKEN"
        case errors.RevisionNotFoundError():
            return f"does not have the revision {name.revision!r} (404)"
        case errors.HFValidationError():
            return f"is neither a path that exists nor a hub id: {one_line(error)}"
    return f"cannot be fetched ({one_line(error)}); try again"
