"""Converts what Python users pass as media (files, arrays, tensors, Pillow images, URLs) to `Medium`."""

from __future__ import annotations

import mimetypes
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from lavis_chatbridge import media as opening
from lavis_chatbridge.chat.conversation import Medium
from lavis_chatbridge.chat.messages import Access, frames_of, open_url
from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media import Sound, Source
from lavis_chatbridge.media.image import upright
from lavis_chatbridge.media.source import is_file, media_errors
from lavis_chatbridge.media.video import open_video
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality

Images: TypeAlias = "Sequence[Source] | Source"
"""Images or videos; a single one stands for a list of one."""
Sounds: TypeAlias = "Sequence[Sound] | Sound"
"""Sounds; a single one stands for a list of one."""
Pairs: TypeAlias = "Sequence[tuple[Modality, Sound]]"
"""Media of any modality."""


def media_of(
    images: Images = (),
    videos: Images = (),
    audios: Sounds = (),
    media: Pairs = (),
    hear_videos: bool = True,
    access: Access | None = None,
) -> list[Medium]:
    """The media of one message, in the forms of `Session.ask`; ``media`` come last, in their own order.

    Args:
        hear_videos: Each video is followed by its own sound track.
        access: Which ``http(s)`` URLs may be fetched; by default none.

    Raises:
        MediaError: If a modality or the form of a medium is unknown.
    """
    given: list[tuple[Modality, Any]] = []
    for modality, listed in zip(MODALITIES, (images, videos, audios), strict=True):
        given += [(modality, one) for one in _listed(modality, listed)]
    for pair in media if isinstance(media, (list, tuple)) else [media]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or str(pair[0]) not in MODALITIES:
            raise MediaError(pair, f"expected pairs (modality, medium), with one of {', '.join(MODALITIES)}")
    result: list[Medium] = []
    for modality, one in [*given, *media]:
        content = _content(modality, one, access or Access())
        result += Medium(modality, content, _name(content)).with_track(hear_videos)
    return result


def modality_of(file: str | Path | bytes) -> Modality:
    """The modality of a file, by its name or else by its content: a webm or mp4 without a picture is a sound."""
    guessed = "" if isinstance(file, bytes) else mimetypes.guess_type(str(file), strict=False)[0] or ""
    if guessed.startswith("image/"):
        return "image"
    if guessed.startswith("audio/"):
        return "audio"
    try:
        return opening.modality_of(file)
    except MediaError:
        return "video"  # opening it raises a clear error


def check_file(file: str, modality: Modality | None = None) -> None:
    """Raise `MediaError` for a path that is not a file, or a file of another modality than it is given as.

    A video's sound track is a sound, and an animated image a video.
    """
    if not os.path.isfile(file):
        raise MediaError(file, "it is a folder" if os.path.isdir(file) else "there is no such file")
    found = modality_of(file)
    if modality and found != modality and (found, modality) not in (("video", "audio"), ("image", "video")):
        raise MediaError(file, f"it is a file of modality {found}, but was given as {modality}")


def _listed(modality: Modality, given: Any) -> list[Any]:
    """Media of one modality, a single one as a list of one."""
    with_rate = isinstance(given, tuple) and any(isinstance(part, numbers.Real) for part in given)
    if with_rate or isinstance(given, (np.ndarray, Tensor, Image)) or is_file(given) or hasattr(given, "read"):
        return [given]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise MediaError(
            given,
            f"{modality}s are given as paths, bytes, file objects, URLs, arrays, tensors or Pillow images, "
            f"one or a list of them, not {type(given).__name__}",
        )
    listed = list(given)
    still = [isinstance(one, Image) and getattr(one, "n_frames", 1) == 1 for one in listed]
    return [listed] if modality == "video" and listed and all(still) else listed


def _content(modality: Modality, given: Any, access: Access) -> Sound:
    """A medium as a path, bytes or an array."""
    if isinstance(given, str) and given.partition(":")[0].lower() in ("http", "https", "data"):
        return open_url(given, given[:60], access)
    if hasattr(given, "read"):
        content = given.read()
        if not isinstance(content, bytes):
            raise MediaError(given, "the file object gives text: open the file in binary mode ('rb')")
        return content
    if isinstance(given, Tensor):
        return _array(given)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor):
        return given[0].detach().cpu().numpy(), given[1]
    if isinstance(given, Image):
        with media_errors(given):
            return open_video(given, range) if modality == "video" else np.asarray(upright(given))
    return frames_of(given) if isinstance(given, list) else given


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor as an array, with torch's channels-first images and videos turned to channels-last."""
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
    if array.ndim in (3, 4) and array.shape[-3] in (1, 3) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, -3, -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    return array


def _name(content: Any) -> str:
    if isinstance(content, tuple):
        return f"{_name(content[0])} at {content[1]} Hz"
    if isinstance(content, (str, os.PathLike)):
        return os.path.basename(os.fspath(content))
    if isinstance(content, np.ndarray):
        return f"array {'x'.join(map(str, content.shape))}"
    if content is None:
        return "None"
    return f"{len(content)} bytes" if is_file(content) else type(content).__name__
