"""Outputs of the frozen encoders on disk: training then reads them instead of running the encoders.

Shards are tar files in webdataset's form (``KEY.tokens.npy`` float16 ``[T, N, D]``, ``KEY.mask.npy`` bool ``[T, N]``),
each with an index of byte offsets for random access. A key depends on the file's content, the frozen encoder and the
processor, so a changed picture, weight or setting is never answered with old features. A shard appears whole or not at
all, counts only once its index is there, and is named after its content's hash: commands that fill one folder at once
never replace what another has read the places of. What is read must bear its key, and a shard that is gone or cut off
holds nothing: its features are made anew. Nothing here knows the encoders.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import math
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lavis_chatbridge.datasets.cache import held, remove_abandoned
from lavis_chatbridge.datasets.dataset import media_source
from lavis_chatbridge.datasets.loader import worker_deaths
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import publish, read_json, write_text
from lavis_chatbridge.media.types import EncodedMedium
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.schema import Medium, Sample

_log = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20
_BLOCK = 1 << 20
_FORMAT = "chatbridge-features-1"
_HEADER = tarfile.BLOCKSIZE
_NUMPY = np.lib.format.magic(1, 0)
_NUMPY_SIZE = len(_NUMPY)
_TOKENS, _MASK = ".tokens.npy", ".mask.npy"

_Stamp: TypeAlias = "tuple[int, int, int]"
"""Size of a file, and the times in ns at which its content and anything of it changed; the latter cannot be set, as
tar and rsync set the former."""


class Encoder(Protocol):
    """What a model must offer to have its encoders' outputs stored."""

    def encode_media(self, kind: Modality, media: list[Any]) -> list[EncodedMedium]:
        """Processed media of one kind through the frozen encoder."""

    def frozen_fingerprint(self, kind: Modality) -> str:
        """Changes whenever the frozen weights do."""


class FeatureStore:
    """Features by medium.

    Args:
        folder: Where the shards lie; made when something is added.
        salts: Modality -> what else the key depends on (encoder and processor), see `salts_of`.

    Raises:
        DataError: If the folder is a file, or holds an index that is none.
    """

    def __init__(self, folder: str | Path, salts: Mapping[Modality, str] | None = None) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"{folder}: features are kept in a folder, and this is a file: name another place")
        self.salts = dict(salts or {})
        self._places: dict[str, tuple[str, list[int]]] = {}
        self._digests: dict[str, tuple[_Stamp, str]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have added."""
        for index in sorted(self.folder.glob("*.index.json")):
            places, files = _index_in(read_json(index), index)
            self._digests |= files
            shard = index.name.replace(".index.json", ".tar")
            if (fault := _lacks(self.folder / shard, places)) is not None:
                _log.warning("%s: %s; its features are made anew (%s may go)", self.folder / shard, fault, index.name)
                continue
            self._places |= {key: (shard, place) for key, place in places.items()}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def key(self, medium: Medium) -> str:
        """The key of a medium: 40 hexadecimal digits.

        Raises:
            MediaError: If the file cannot be read.
        """
        salt = f"{medium.kind}:{self.salts.get(medium.kind, '')}:{self._digest(medium)}"
        return hashlib.sha256(salt.encode()).hexdigest()[:40]

    def get(self, key: str) -> EncodedMedium:
        """The stored features, tokens in float16.

        Raises:
            DataError: If the shard is damaged or gone, or holds another medium's features there.
        """
        name, (at, size, mask_at, mask_size) = self._places[key]
        path = self.folder / name
        try:
            with open(path, "rb") as shard:
                tokens = _load_array(shard, f"{key}{_TOKENS}", at, size)
                mask = _load_array(shard, f"{key}{_MASK}", mask_at, mask_size)
            if (
                tokens.dtype != np.float16
                or mask.dtype != np.bool_
                or tokens.ndim != 3
                or mask.shape != tokens.shape[:2]
            ):
                raise ValueError(f"{tokens.dtype} {list(tokens.shape)} and {mask.dtype} {list(mask.shape)} are stored")
        except (OSError, ValueError, EOFError, MemoryError, OverflowError, TokenError, tarfile.TarError) as error:
            cause = " ".join(str(error).split())
            raise DataError(
                f"{path}: features cannot be read ({cause}); delete {self.folder} to make them anew"
            ) from error
        return EncodedMedium(torch.from_numpy(tokens), torch.from_numpy(mask))

    def find(self, medium: Medium) -> EncodedMedium | None:
        """The stored features of a medium, or None if there are none.

        Raises:
            MediaError: If the file cannot be read.
        """
        key = self.key(medium)
        return self.get(key) if key in self._places else None

    def add(self, features: Iterable[tuple[Medium, EncodedMedium]]) -> int:
        """Write features to new shards; returns how many. What is written before an error stays.

        Raises:
            DataError: If the folder cannot be written to.
        """
        for left in self.folder.glob("tmp*.tmp"):
            remove_abandoned(left)
        count = 0
        rest = iter(features)
        while True:
            written = self._write_shard(rest)
            count += written
            if not written:
                return count

    def _digest(self, medium: Medium) -> str:
        """SHA-256 of a medium's bytes, kept while the file stays as it is."""
        name = _name(medium)
        try:
            stamp = _stamp(medium.path)
            known = self._digests.get(name)
            if known is not None and known[0] == stamp:
                return known[1]
            digest = _sha256(medium.path, medium.offset or 0, medium.size)
        except OSError as error:
            raise MediaError(medium.path, error.strerror or error) from error
        self._digests[name] = (stamp, digest)
        return digest

    def _write_shard(self, features: Iterator[tuple[Medium, EncodedMedium]]) -> int:
        """One shard of at most about `SHARD_BYTES`; returns how many features went into it."""
        first = next(features, None)
        if first is None:
            return 0
        temporary = self._new_file()
        try:
            with held(temporary):
                places, files = self._fill(temporary, first, features)
                name = f"{first[0].kind}-{_sha256(temporary)[:32]}"  # a file that has this name already is the same one
                publish(temporary, self.folder / f"{name}.tar")
            index = {"format": _FORMAT, "places": places, "files": files}
            write_text(self.folder / f"{name}.index.json", json.dumps(index))
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(
                f"{self.folder}: features cannot be written there: {error.strerror or error}; the same command goes on "
                "with what is missing"
            ) from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._places |= {key: (f"{name}.tar", place) for key, place in places.items()}
        return len(places)

    def _fill(
        self, path: Path, first: tuple[Medium, EncodedMedium], more: Iterator[tuple[Medium, EncodedMedium]]
    ) -> tuple[dict[str, list[int]], dict[str, list[Any]]]:
        """Write a tar file; returns the places of its features, and the digests of the files that they are of."""
        places: dict[str, list[int]] = {}
        files: dict[str, list[Any]] = {}
        with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            item: tuple[Medium, EncodedMedium] | None = first
            while item is not None:
                medium, encoded = item
                key = self.key(medium)
                places[key] = _append(tar, f"{key}{_TOKENS}", encoded.tokens.half())
                places[key] += _append(tar, f"{key}{_MASK}", encoded.mask.bool())
                stamp, digest = self._digests[_name(medium)]
                files[_name(medium)] = [*stamp, digest]
                item = next(more, None) if tar.offset < SHARD_BYTES else None
        return places, files

    def _new_file(self) -> Path:
        """An empty temporary file of the folder, which is made where missing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        except OSError as error:
            raise DataError(f"{self.folder}: features cannot be written there: {error.strerror or error}") from error
        os.close(handle)
        return Path(name)


def salts_of(
    model: Encoder, processors: Mapping[str, Any], kinds: Iterable[Modality] = MODALITIES
) -> dict[Modality, str]:
    """What a key depends on beside the content: the frozen weights and the processor of each kind."""
    return {
        kind: f"{model.frozen_fingerprint(kind)}:{processors[kind].version}" for kind in kinds if kind in processors
    }


def build_features(
    model: Encoder,
    samples: Iterable[Sample],
    processors: Mapping[str, Any],
    folder: str | Path,
    batch: int = 16,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> FeatureStore:
    """Encode every distinct medium of the samples that the store does not hold yet.

    Args:
        model: The model; its encoders are run as they are, so put it on its device first.
        samples: Whose media.
        processors: Modality -> evaluation processor (what is drawn at random cannot be stored).
        folder: The store.
        batch: Media per forward pass.
        workers: Processes that open media.
        rank: With several processes each encodes its share; let all finish, then call `FeatureStore.refresh`.
        world_size: Number of processes.

    Returns:
        The store. Media that cannot be read are logged and left out; training counts them when it meets them.
    """
    store = FeatureStore(folder, salts_of(model, processors))
    missing: dict[Modality, dict[str, Medium]] = {kind: {} for kind in MODALITIES}
    seen: set[Medium] = set()
    for sample in samples:
        for medium in sample.files:
            if medium in seen:
                continue
            seen.add(medium)
            try:
                key = store.key(medium)
            except MediaError as error:
                _log.warning("no features: %s", error)
                continue
            if key not in store and int(key, 16) % world_size == rank:
                missing[medium.kind][key] = medium
    for kind, media in missing.items():
        mine = list(media.values())
        if mine:
            keys = {medium: key for key, medium in media.items()}
            encoded = _encode(model, kind, mine, processors[kind], batch, workers)
            count = store.add(pair for pair in encoded if _is_still(store, pair[0], keys[pair[0]]))
            _log.info("stored features of %d %s files in %s", count, kind, folder)
    return store


def _is_still(store: FeatureStore, medium: Medium, key: str) -> bool:
    """Whether a medium is what it was before it was opened: features must not bear the key of later content."""
    try:
        same = store.key(medium) == key
    except MediaError as error:
        _log.warning("no features: %s", error)
        return False
    if not same:
        _log.warning("no features: %s has changed while it was encoded", medium.path)
    return same


class _Opened(Dataset):
    """Media through their processor; what cannot be read comes as its error."""

    def __init__(self, media: Sequence[Medium], processor: Any) -> None:
        self._media, self._processor = media, processor

    def __len__(self) -> int:
        return len(self._media)

    def __getitem__(self, index: int) -> tuple[Medium, Any]:
        medium = self._media[index]
        try:
            return medium, self._processor(media_source(medium))
        except MediaError as error:
            return medium, error


def _encode(
    model: Encoder, kind: Modality, media: Sequence[Medium], processor: Any, batch: int, workers: int
) -> Iterator[tuple[Medium, EncodedMedium]]:
    loader: DataLoader = DataLoader(
        _Opened(media, processor), batch_size=batch, num_workers=workers, collate_fn=_as_it_is
    )
    with worker_deaths():
        for opened in loader:
            readable = []
            for medium, content in opened:
                if isinstance(content, MediaError):
                    _log.warning("no features: %s", content)
                else:
                    readable.append((medium, content))
            if readable:
                encoded = model.encode_media(kind, [content for _, content in readable])
                for (medium, _), features in zip(readable, encoded, strict=True):
                    yield medium, EncodedMedium(features.tokens.detach().cpu(), features.mask.detach().cpu())


def _as_it_is(items: Any) -> Any:
    return items


def _name(medium: Medium) -> str:
    """What a medium's digest is kept under, wherever the process was started."""
    path = os.path.abspath(medium.path)
    return path if medium.offset is None else f"{path}@{medium.offset}+{medium.size}"


def _stamp(path: str) -> _Stamp:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _lacks(shard: Path, places: Mapping[str, Sequence[int]]) -> str | None:
    """What keeps a shard from holding features at all these places: it is gone, or too short."""
    end = max((at + size for place in places.values() for at, size in (place[:2], place[2:])), default=0)
    try:
        size = shard.stat().st_size
    except OSError as error:
        return error.strerror or str(error)
    return f"it ends before byte {end}" if size < end else None


def _sha256(path: str | Path, offset: int = 0, left: int | None = None) -> str:
    """Of a file, or of ``left`` of its bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(min(offset, os.fstat(file.fileno()).st_size))
        while block := file.read(_BLOCK if left is None else min(_BLOCK, left)):
            digest.update(block)
            left = None if left is None else left - len(block)
    return digest.hexdigest()


def _append(tar: tarfile.TarFile, name: str, tensor: torch.Tensor) -> list[int]:
    """Add a tensor as ``.npy``; returns offset and size of its bytes within the tar."""
    buffer = io.BytesIO()
    np.save(buffer, tensor.detach().cpu().contiguous().numpy())  # rows first, as they are read
    entry = tarfile.TarInfo(name)
    entry.size = buffer.tell()
    buffer.seek(0)
    at = tar.offset + _HEADER
    tar.addfile(entry, buffer)
    return [at, entry.size]


def _load_array(shard: Any, name: str, at: int, size: int) -> np.ndarray:
    """The array that a shard holds at a place, if it is the one of this name."""
    if at + size > os.fstat(shard.fileno()).st_size:
        raise ValueError(f"it ends before byte {at + size}")
    shard.seek(at - _HEADER)
    entry = tarfile.TarInfo.frombuf(shard.read(_HEADER), "utf-8", "surrogateescape")
    if (entry.name, entry.size) != (name, size):
        raise ValueError(f"it holds {entry.size} bytes of {entry.name!r} where the index has {size} of {name}")
    content = shard.read(size)
    begin = _NUMPY_SIZE + 2
    if content[:_NUMPY_SIZE] != _NUMPY or len(content) < begin:
        raise ValueError(f"it holds no array of numpy's format 1.0: it begins with {content[:_NUMPY_SIZE]!r}")
    end = begin + int.from_bytes(content[_NUMPY_SIZE:begin], "little")
    shape, by_columns, kind = _described(content[_NUMPY_SIZE:end])
    if by_columns or kind.hasobject or math.prod(shape) * kind.itemsize != size - end:
        raise ValueError(f"an array {kind} {list(shape)} does not fit {size} bytes")
    return np.frombuffer(content, kind, offset=end).reshape(shape).copy()


@functools.lru_cache(maxsize=64)
def _described(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """What an array's header says; few differ in a shard, and to take one apart costs more than to read the numbers."""
    return np.lib.format.read_array_header_1_0(io.BytesIO(header))


def _index_in(content: Any, path: Path) -> tuple[dict[str, list[int]], dict[str, tuple[_Stamp, str]]]:
    """The places of features, and the digests of files, that an index holds."""
    fault = f"{path}: not the index of a feature shard; name another folder, or delete this file"
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError(fault)
    places, files = content.get("places"), content.get("files")
    if not isinstance(places, dict) or not all(_are(place, int, int, int, int) for place in places.values()):
        raise DataError(fault)
    stamps = ((int, int, int, str), (int, int, str))  # the latter of an earlier version: too little to trust a digest
    if not isinstance(files, dict) or not all(any(_are(known, *s) for s in stamps) for known in files.values()):
        raise DataError(fault)
    if any(min(place) < 0 for place in places.values()):
        raise DataError(fault)
    trusted = {name: known for name, known in files.items() if len(known) == 4}
    return places, {name: ((known[0], known[1], known[2]), known[3]) for name, known in trusted.items()}


def _are(values: Any, *kinds: type) -> bool:
    """Whether this is a list of values of these types."""
    return isinstance(values, list) and list(map(type, values)) == list(kinds)
