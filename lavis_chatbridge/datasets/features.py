"""Caches the frozen encoders' outputs on disk, so that training need not run the encoders.

The key is a hash of the file's content, the frozen encoder and the processor, so outdated features are never used.
Features are safetensors inside the shards of `datasets.shards`: ``tokens`` float16 ``[T, N, D]`` and ``mask`` bool
``[T, N]``. This module knows no encoder.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors
from safetensors.torch import load, save
from torch.utils.data import DataLoader

from lavis_chatbridge.datasets.dataset import media_content
from lavis_chatbridge.datasets.loader import worker_deaths
from lavis_chatbridge.datasets.shards import PER_SHARD, read_index, tar_file, write_index
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.files import hash_of, hash_of_file
from lavis_chatbridge.media.source import EncodedMedium
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality
from lavis_chatbridge.schema import Medium

_log = logging.getLogger(__name__)


class Encoder(Protocol):
    """A model with frozen encoders."""

    def encode_media(self, modality: Modality, media: list[Any]) -> list[EncodedMedium]: ...
    def frozen_hash(self, modality: Modality) -> str: ...


class FeatureStore:
    """The features of media, by key, in the shards of a folder; ``encoders`` are the `encoder_hashes`."""

    def __init__(self, folder: str | Path, encoders: Mapping[Modality, str]) -> None:
        self.folder = Path(folder)
        self._encoders = encoders
        self.locations: dict[str, tuple[Path, int, int]] = {}
        """Key -> a shard, and the offset and size of the features in it."""
        self._files: dict[str, list[Any]] = {}
        """Name of a medium -> its file's size, mtime and ctime in ns, and its content's hash."""
        self.refresh()

    def refresh(self) -> None:
        """Read the indexes of all shards, also of other processes; incomplete shards are ignored."""
        for shard in sorted(self.folder.glob("*.tar")):
            if (index := read_index(shard)) is not None:
                self._files |= index["files"]
                self.locations |= {key: (shard, *location) for key, location in index["locations"].items()}

    def __contains__(self, medium: Medium) -> bool:
        try:
            return self.key(medium) in self.locations
        except MediaError:
            return False

    def key(self, medium: Medium) -> str:
        """The key of a medium: 40 hexadecimal digits; a `MediaError` if the file cannot be read.

        The content is hashed again only if the file's size or times change.
        """
        name = _name(medium)
        try:
            status = os.stat(medium.path)
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]  # ctime, because tar and rsync set mtime
            if name not in self._files or self._files[name][:3] != state:
                self._files[name] = [*state, content_hash(medium)]
        except OSError as error:
            raise MediaError(medium.path, error.strerror or error) from error
        return hash_of(medium.modality, self._encoders.get(medium.modality, ""), self._files[name][3])[:40]

    def find(self, medium: Medium) -> EncodedMedium | None:
        """A medium's stored features, tokens in float16; None if there are none. A damaged shard is a `DataError`."""
        location = self.locations.get(self.key(medium))
        if location is None:
            return None
        shard, offset, size = location
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                stored = load(file.read(size))
            return EncodedMedium(stored["tokens"], stored["mask"])
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise DataError(f"{shard}: features cannot be read ({error}); delete this file") from error

    def add(self, features: Iterable[tuple[str, Medium, EncodedMedium]]) -> int:
        """Write features (with the key and the medium) to a new shard, and return their number."""
        shard = self.folder / f"features-{uuid.uuid4().hex}.tar"
        locations: dict[str, tuple[int, int]] = {}
        files: dict[str, list[Any]] = {}
        try:
            with tar_file(shard) as add:
                for key, medium, encoded in features:
                    tensors = {"tokens": encoded.tokens.half(), "mask": encoded.mask.bool()}
                    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
                    locations[key] = add(f"{key}.safetensors", content)
                    files[_name(medium)] = self._files[_name(medium)]
            write_index(shard, {"locations": locations, "files": files})
        except OSError as error:
            raise DataError(f"{self.folder}: features cannot be written there: {error.strerror or error}") from error
        self.locations |= {key: (shard, *location) for key, location in locations.items()}
        return len(locations)


def encoder_hashes(model: Encoder, processors: Mapping[str, Any]) -> dict[Modality, str]:
    """Modality -> hash of the frozen weights and the processor; a part of each medium's key."""
    own = [modality for modality in MODALITIES if modality in processors]
    return {modality: f"{model.frozen_hash(modality)}:{processors[modality].version}" for modality in own}


def build_features(
    model: Encoder,
    media: Iterable[Medium],
    processors: Mapping[str, Any],
    folder: str | Path,
    batch: int = 16,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> FeatureStore:
    """Encode the media that are not in the store.

    Unreadable media are logged and skipped; training counts them when it reads them. ``processors`` are those of
    evaluation (without random augmentation), by modality; ``workers`` processes open media. A rank encodes its share;
    when all have finished, call `FeatureStore.refresh`.
    """
    store = FeatureStore(folder, encoder_hashes(model, processors))
    missing: dict[Modality, dict[str, Medium]] = {modality: {} for modality in MODALITIES}
    for medium in media:
        try:
            key = store.key(medium)
        except MediaError as error:
            _log.warning("no features: %s", error)
            continue
        if key not in store.locations and int(key, 16) % world_size == rank:
            missing[medium.modality][key] = medium
    for modality, found in missing.items():
        every = list(found.items())
        for first in range(0, len(every), PER_SHARD):
            opening = functools.partial(_opened, store, processors[modality])  # runs in the workers
            part: Any = every[first : first + PER_SHARD]
            loader: DataLoader = DataLoader(part, batch, num_workers=workers, collate_fn=opening)
            number = store.add(_encode(model, modality, loader))
            _log.info("stored features of %d %s files in %s", number, modality, folder)
    return store


def content_hash(medium: Medium) -> str:
    """The SHA-256 of a medium's bytes."""
    content = media_content(medium)
    return hash_of_file(content) if isinstance(content, str) else hashlib.sha256(content).hexdigest()


def _name(medium: Medium) -> str:
    """The name of a medium, independent of the working directory."""
    path = os.path.abspath(medium.path)
    return path if medium.offset is None else f"{path}@{medium.offset}+{medium.size}"


def _encode(
    model: Encoder, modality: Modality, loader: Iterable[Sequence[tuple[str, Medium, Any]]]
) -> Iterator[tuple[str, Medium, EncodedMedium]]:
    with worker_deaths():
        for opened in loader:
            encoded = model.encode_media(modality, [content for _, _, content in opened]) if opened else []
            for (key, medium, _), features in zip(opened, encoded, strict=True):
                yield key, medium, features


def _opened(store: FeatureStore, processor: Any, media: Sequence[tuple[str, Medium]]) -> list[tuple[str, Medium, Any]]:
    """The media with their keys and processed contents; unreadable and changed ones are logged and left out."""
    found = []
    for key, medium in media:
        try:
            content = processor(media_content(medium))
            if store.key(medium) != key:
                raise MediaError(medium.path, "changed while it was encoded")
            found.append((key, medium, content))
        except MediaError as error:
            _log.warning("no features: %s", error)
    return found
