"""What lmms-eval asks, in ChatBridge's terms: turns with their media, and how answers are decoded.

lmms-eval hands media over as its data sets hold them: paths, bytes, Pillow images, arrays, dictionaries of the
``datasets`` library. This module says which kind each is and opens none; it does not import lmms-eval.
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
from lavis_chatbridge.prompting import Modality
from lavis_chatbridge.prompting.pieces import MODALITIES

MAX_NEW_TOKENS = 128
"""Where a task says nothing; the other models of lmms-eval have the same."""

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SOUNDS = (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".oga", ".opus")
_SOUND_HEADS = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2")
_CUTS = ("video_start", "video_end", "start_time", "end_time")


@dataclass(frozen=True)
class Given:
    """One medium: its kind, and what a processor opens. ``track``: a video's own sound, which may be missing."""

    kind: Modality
    source: Any
    track: bool = False


@dataclass(frozen=True)
class Said:
    """One turn of what is asked."""

    role: str
    text: str
    media: tuple[Given, ...] = ()


def question(text: str, visuals: Any, hear_videos: bool = False) -> list[Said]:
    """A question of lmms-eval's plain tasks: media first, as ChatBridge was trained.

    Args:
        text: The question; ``<image>``, lmms-eval's mark of a place, is no part of it.
        visuals: What the task's ``doc_to_visual`` gave: media, lists of them, or nothing.
        hear_videos: Each video is followed by its own sound.
    """
    listed = tuple(
        heard(medium_of(visual) for visual in _flat(visuals)) if hear_videos else map(medium_of, _flat(visuals))
    )
    return [Said("user", text.replace("<image>", "").strip(), listed)]


def conversation(messages: Iterable[Mapping[str, Any]], hear_videos: bool = False) -> list[Said]:
    """The turns of lmms-eval's chat tasks: a system's words open the first turn, turns of the same role are one.

    Raises:
        DataError: If the last turn is not the user's, or a role is unknown.
    """
    turns: list[Said] = []
    opening = ""
    for message in messages:
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        text = "\n".join(str(part["text"]) for part in parts if part["type"] == "text").strip()
        media = tuple(medium_of(part["url"], part["type"], part) for part in parts if part["type"] != "text")
        if role == "system":
            opening = f"{opening}\n{text}".strip()
            continue
        if role not in ("user", "assistant"):
            raise DataError(f"a message of the role {role!r}: expected system, user or assistant")
        said = Said(role, text, tuple(heard(media)) if hear_videos else media)
        if turns and turns[-1].role == role:
            last = turns.pop()
            said = Said(role, f"{last.text}\n{text}".strip(), last.media + said.media)
        turns.append(said)
    if not turns or turns[0].role != "user" or turns[-1].role != "user":
        raise DataError(f"messages of the roles {[turn.role for turn in turns]}: expected user ... user")
    first = turns[0]
    return [Said("user", f"{opening}\n{first.text}".strip(), first.media), *turns[1:]]


def medium_of(given: Any, kind: str = "", more: Mapping[str, Any] | None = None) -> Given:
    """One medium, from whatever form it has.

    Args:
        given: A path, the bytes of a file, a Pillow image, an array, a dictionary of the ``datasets`` library
            (``array`` and ``sampling_rate``, or ``bytes`` and ``path``), or a torchcodec decoder of sound.
        kind: What a chat message calls it; lmms-eval itself calls any dictionary a video, so sound is heard as sound.
        more: The message's other fields.

    Raises:
        MediaError: If only a part of a video is asked for, or it is of no known form.
    """
    cuts = [
        key for key in _CUTS for about in (more, given) if isinstance(about, Mapping) and about.get(key) is not None
    ]
    if cuts:
        raise MediaError(_named(given), f"a part of a video ({cuts[0]}) cannot be asked for; cut the file beforehand")
    if isinstance(given, Mapping) and given.get("array") is not None:
        return Given("audio", wav(np.asarray(given["array"]), int(given["sampling_rate"])))
    if hasattr(given, "get_all_samples"):
        samples = given.get_all_samples()
        return Given("audio", wav(samples.data.numpy(), int(samples.sample_rate)))
    if isinstance(given, Mapping):
        inner = next(
            (given[key] for key in ("bytes", "path", "url", "video", "image", "audio") if given.get(key)), None
        )
        if inner is None:
            raise MediaError(_named(given), f"a medium with the fields {sorted(given)}, none of which is known")
        named = str(given.get("type") or kind)
        return medium_of(inner, named if named in MODALITIES else "")
    return Given(kind if kind in MODALITIES else _kind_of(given), given)  # type: ignore[arg-type]


def heard(media: Iterable[Given]) -> Iterator[Given]:
    """The media, each video followed by its own sound, unless a sound comes with it anyway."""
    listed = list(media)
    alone = not any(medium.kind == "audio" for medium in listed)
    for medium in listed:
        yield medium
        if alone and medium.kind == "video" and not isinstance(medium.source, np.ndarray):
            yield Given("audio", medium.source, track=True)


def decoding(said: Mapping[str, Any]) -> dict[str, Any]:
    """A task's ``generation_kwargs`` as arguments of ChatBridge's ``generate``; what it does not know is left out."""
    temperature = float(said.get("temperature") or 0.0)
    sampling = bool(said.get("do_sample", temperature > 0)) and temperature > 0
    return {
        "use_nucleus_sampling": sampling,
        "temperature": temperature if sampling else 1.0,
        "top_p": float(said.get("top_p") or 1.0),
        "num_beams": 1 if sampling else int(said.get("num_beams") or 1),
        "max_length": int(said.get("max_new_tokens") or said.get("max_gen_toks") or MAX_NEW_TOKENS),
        "min_length": int(said.get("min_new_tokens") or 1),
        "repetition_penalty": float(said.get("repetition_penalty") or 1.0),
        "length_penalty": float(said.get("length_penalty") or 1.0),
    }


def cut(answer: str, until: str | Sequence[str] | None) -> str:
    """An answer up to the first of a task's stop texts."""
    for stop in [until] if isinstance(until, str) else until or ():
        answer = answer.split(stop)[0] if stop else answer
    return answer.strip()


def batches(keys: Sequence[str], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of requests in batches: only those of one key together, the longest first."""
    for key in dict.fromkeys(keys):
        places = sorted((i for i, other in enumerate(keys) if other == key), key=lambda i: -lengths[i])
        yield from (places[start : start + size] for start in range(0, len(places), size))


def wav(samples: np.ndarray, rate: int) -> bytes:
    """Samples ``[S]`` or ``[C,S]`` as a file that states its rate."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples.T.astype(np.float32), rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _flat(visuals: Any) -> Iterator[Any]:
    if visuals is None:
        return
    if isinstance(visuals, (list, tuple)):
        for visual in visuals:
            yield from _flat(visual)
    else:
        yield visuals


def _kind_of(given: Any) -> Modality:
    """The kind of a medium that nobody names: by the file's ending, its first bytes, or its form."""
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
