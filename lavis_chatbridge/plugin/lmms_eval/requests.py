"""Requests of lmms-eval in ChatBridge's terms: messages with their media, and how answers are decoded.

lmms-eval passes media as its data sets hold them: paths, bytes, Pillow images, arrays, dictionaries of the ``datasets``
library. This module names each one's modality and opens none; it does not import lmms-eval.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.media.source import is_picture
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality

MAX_NEW_TOKENS = 128
"""The default of lmms-eval's other models."""

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SOUNDS = (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".oga", ".opus")
_SOUND_HEADS = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2")
_CUTS = ("video_start", "video_end", "start_time", "end_time")
_FIELDS = ("bytes", "path", "url", "video", "image", "audio")


@dataclass(frozen=True)
class Given:
    """One medium: its modality, and what a processor opens. ``track``: a video's own sound, which may be missing."""

    modality: Modality
    source: Any
    track: bool = False


@dataclass(frozen=True)
class Said:
    """One message of a request."""

    role: str
    text: str
    media: tuple[Given, ...] = ()


def question(text: str, visuals: Any, hear_videos: bool = False) -> list[Said]:
    """A question of lmms-eval's plain tasks: media first, as ChatBridge was trained, without markers ``<image>``.

    Args:
        text: The question.
        visuals: What the task's ``doc_to_visual`` returned: media, lists of them, or None.
        hear_videos: Each video is followed by its own sound.
    """
    media = [medium_of(visual) for visual in _flat(visuals)]
    return [Said("user", text.replace("<image>", "").strip(), tuple(heard(media) if hear_videos else media))]


def conversation(messages: Iterable[Mapping[str, Any]], hear_videos: bool = False) -> list[Said]:
    """The messages of lmms-eval's chat tasks; a system's words open the first one, neighbours of one role are joined.

    Raises:
        DataError: If the last message is not the user's, or a role is unknown.
    """
    joined: list[Said] = []
    opening = ""
    for message in messages:
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        text = "\n".join(str(part["text"]) for part in parts if part["type"] == "text").strip()
        media = [medium_of(part["url"], part["type"], part) for part in parts if part["type"] != "text"]
        if role == "system":
            opening = f"{opening}\n{text}".strip()
            continue
        if role not in ("user", "assistant"):
            raise DataError(f"a message of the role {role!r}: expected system, user or assistant")
        said = Said(role, text, tuple(heard(media) if hear_videos else media))
        if joined and joined[-1].role == role:
            last = joined.pop()
            said = Said(role, f"{last.text}\n{text}".strip(), last.media + said.media)
        joined.append(said)
    if not joined or joined[0].role != "user" or joined[-1].role != "user":
        raise DataError(f"messages of the roles {[said.role for said in joined]}: expected user ... user")
    return [Said("user", f"{opening}\n{joined[0].text}".strip(), joined[0].media), *joined[1:]]


def medium_of(given: Any, modality: str = "", more: Mapping[str, Any] | None = None) -> Given:
    """One medium, from whatever form it has.

    Args:
        given: A path, the bytes of a file, a Pillow image, an array, a dictionary of the ``datasets`` library
            (``array`` and ``sampling_rate``, or ``bytes`` and ``path``), or a torchcodec decoder of sound.
        modality: What a chat message calls it; lmms-eval itself calls any dictionary a video.
        more: The message's other fields.

    Raises:
        MediaError: If only a part of a video is asked for, or its form is unknown.
    """
    fields = [about for about in (more, given) if isinstance(about, Mapping)]
    if cuts := [key for key in _CUTS for about in fields if about.get(key) is not None]:
        raise MediaError(_named(given), f"a part of a video ({cuts[0]}) cannot be asked for; cut the file beforehand")
    if hasattr(given, "get_all_samples"):
        samples = given.get_all_samples()
        return Given("audio", wav(samples.data.numpy(), int(samples.sample_rate)))
    if not isinstance(given, Mapping):
        return Given(modality if modality in MODALITIES else _modality_of(given), given)  # type: ignore[arg-type]
    if given.get("array") is not None:
        return Given("audio", wav(np.asarray(given["array"]), int(given["sampling_rate"])))
    inner = next((given[key] for key in _FIELDS if given.get(key)), None)
    if inner is None:
        raise MediaError(_named(given), f"a medium with the fields {sorted(given)}, none of which is known")
    named = str(given.get("type") or modality)
    return medium_of(inner, named if named in MODALITIES else "")


def heard(media: Sequence[Given]) -> Iterator[Given]:
    """The media, each video followed by its own sound, unless they have sounds already."""
    alone = not any(medium.modality == "audio" for medium in media)
    for medium in media:
        yield medium
        if alone and medium.modality == "video" and not isinstance(medium.source, np.ndarray):
            yield Given("audio", medium.source, track=True)


def decoding(said: Mapping[str, Any]) -> Sampling:
    """A task's ``generation_kwargs``; keys that ChatBridge does not know are left out."""
    temperature = float(said.get("temperature") or 0.0) if said.get("do_sample", True) else 0.0
    return Sampling(
        max_new_tokens=int(said.get("max_new_tokens") or said.get("max_gen_toks") or MAX_NEW_TOKENS),
        min_new_tokens=int(said.get("min_new_tokens") or 1),
        temperature=temperature,
        top_p=float(said.get("top_p") or 1.0),
        num_beams=1 if temperature else int(said.get("num_beams") or 1),
        repetition_penalty=float(said.get("repetition_penalty") or 1.0),
        length_penalty=float(said.get("length_penalty") or 1.0),
    )


def cut(answer: str, until: str | Sequence[str] | None) -> str:
    """An answer up to the first of a task's stop texts."""
    for stop in [until] if isinstance(until, str) else until or ():
        answer = answer.split(stop)[0] if stop else answer
    return answer.strip()


def batches(keys: Sequence[str], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of requests in batches: only those of one key together, the longest first."""
    for key in dict.fromkeys(keys):
        numbers = sorted((i for i, other in enumerate(keys) if other == key), key=lambda i: -lengths[i])
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def wav(samples: np.ndarray, rate: int) -> bytes:
    """Samples ``[S]`` or ``[C,S]`` as a file that states its rate."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples.T.astype(np.float32), rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _flat(visuals: Any) -> Iterator[Any]:
    if isinstance(visuals, (list, tuple)):
        for visual in visuals:
            yield from _flat(visual)
    elif visuals is not None:
        yield visuals


def _modality_of(given: Any) -> Modality:
    """The modality of a medium that nothing names: by the file's ending, its first bytes, or its form."""
    if isinstance(given, (str, os.PathLike)):
        ending = os.path.splitext(os.fspath(given))[1].lower()
        return "image" if ending in _PICTURES else "audio" if ending in _SOUNDS else "video"
    if isinstance(given, (bytes, bytearray, memoryview)):
        head = bytes(given[:16])
        if head.startswith(_SOUND_HEADS) or (head[:4] == b"RIFF" and head[8:12] == b"WAVE"):
            return "audio"
        return "image" if is_picture(head) else "video"
    if isinstance(given, np.ndarray):
        return "video" if given.ndim == 4 else "image"
    if hasattr(given, "tobytes") and hasattr(given, "mode"):
        return "image"
    raise MediaError(_named(given), f"a {type(given).__name__} is no medium that ChatBridge knows")


def _named(given: Any) -> str:
    path = given.get("path") or given.get("url") if isinstance(given, Mapping) else given
    return str(path) if isinstance(path, (str, os.PathLike)) else f"a {type(given).__name__}"
