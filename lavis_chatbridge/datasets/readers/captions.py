"""Readers of caption annotations: COCO and Flickr30k (Karpathy), NoCaps, MSRVTT, VATEX, AudioCaps, Clotho, WavCaps,
WebVid, VALOR.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

from lavis_chatbridge.config import shown
from lavis_chatbridge.datasets.readers.common import Origin, Row, begins_with, json_rows, table_rows
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.schema import Sample

_CLOTHO_CAPTIONS = 5


def coco_karpathy(origin: Origin) -> Iterator[Sample]:
    """COCO captions in Karpathy's split: his ``dataset_coco.json``, or LAVIS's ``coco_karpathy_{train,val,test}.json``.

    Option ``split`` (his file holds all): ``train`` takes ``restval`` too. Media field: ``image``
    (``val2014/COCO_val2014_000000391895.jpg``). His ``dataset_flickr30k.json`` has the same form without folders.
    """
    path = origin.file("file")
    if begins_with(path, "["):
        for number, row in enumerate(json_rows(path)):
            image = row.text("image")
            name = os.path.splitext(os.path.basename(image))[0]
            media = origin.locate(row.where, image=image)
            # LAVIS's training file has a row per caption, the others a row per picture
            suffix = f"#{number}" if isinstance(row.values.get("caption"), str) else ""
            yield Sample(name + suffix, media, row.texts("caption"), meta={"image_id": name})
        return
    split = origin.options.get("split", "train")
    wanted = ("train", "restval") if split == "train" else (split,)
    for row in json_rows(path, "images"):
        if row.text("split") in wanted:
            folder = f"{row.text('filepath')}/" if "filepath" in row else ""
            media = origin.locate(row.where, image=folder + row.text("filename"))
            captions = tuple(sentence.text("raw") for sentence in row.rows("sentences"))
            number = row.whole("cocoid", "imgid")
            yield Sample(str(number), media, captions, meta={"image_id": number})


def coco_annotations(origin: Origin) -> Iterator[Sample]:
    """COCO's own annotation form, which NoCaps has too: ``images``, and ``annotations`` with a caption each.

    NoCaps' ``domain`` of a picture is kept. Media field: ``file_name``.
    """
    path = origin.file("file")
    captions: dict[int, list[str]] = {}
    for row in json_rows(path, "annotations"):
        captions.setdefault(row.whole("image_id"), []).append(row.text("caption"))
    for row in json_rows(path, "images"):
        number = row.whole("id")
        if number in captions:
            media = origin.locate(row.where, file_name=row.text("file_name"))
            meta = {"image_id": number} | ({"type": row.text("domain")} if "domain" in row else {})
            yield Sample(str(number), media, tuple(captions[number]), meta=meta)


def vatex(origin: Origin) -> Iterator[Sample]:
    """VATEX's JSON: ``videoID`` and ten English captions (``enCap``). Media field: ``video_id``."""
    for row in json_rows(origin.file("file")):
        name = row.text("videoID")
        yield Sample(name, origin.locate(row.where, video_id=name), row.texts("enCap"))


def msrvtt(origin: Origin) -> Iterator[Sample]:
    """MSRVTT's ``videodatainfo``: ``videos`` with a split, ``sentences`` with captions.

    Option ``split`` (``train``, ``validate``, ``test``): the files of 2016 hold several. Media field: ``video_id``
    (``video7``).
    """
    path = origin.file("file")
    split = origin.options.get("split")
    videos = {row.text("video_id"): row for row in json_rows(path, "videos")}
    captions: dict[str, list[str]] = {}
    for row in json_rows(path, "sentences"):
        if row.text("video_id") not in videos:
            raise DataError(f"{row.where}: video {shown(row.text('video_id'))} is not among the videos")
        captions.setdefault(row.text("video_id"), []).append(row.text("caption"))
    for name, row in videos.items():
        if split in (None, row.values.get("split")) and name in captions:
            yield Sample(name, origin.locate(row.where, video_id=name), tuple(captions[name]))


def audiocaps(origin: Origin) -> Iterator[Sample]:
    """AudioCaps' CSV. Media fields: ``audiocap_id``, ``youtube_id``, ``start_time`` (seconds).

    In the validation and test files a sound has five lines: they become one sample.
    """
    sounds: dict[str, tuple[str, tuple, list[str]]] = {}
    for row in table_rows(origin.file("file")):
        key = f"{row.text('youtube_id')}_{row.text('start_time')}"
        if key not in sounds:
            fields = {"youtube_id": row.text("youtube_id"), "start_time": row.whole("start_time")}
            media = origin.locate(row.where, audiocap_id=row.whole("audiocap_id"), **fields)
            sounds[key] = (row.text("audiocap_id"), media, [])
        sounds[key][2].append(row.text("caption"))
    for name, media, captions in sounds.values():
        yield Sample(name, media, tuple(captions))


def clotho(origin: Origin) -> Iterator[Sample]:
    """Clotho's CSV: a file name and five captions. Media field: ``file_name``."""
    for row in table_rows(origin.file("file")):
        name = row.text("file_name")
        captions = tuple(row.text(f"caption_{number}") for number in range(1, _CLOTHO_CAPTIONS + 1))
        yield Sample(name, origin.locate(row.where, file_name=name), captions)


def wavcaps(origin: Origin) -> Iterator[Sample]:
    """WavCaps' JSON of one of its sources. Media field: ``id`` (without ``.wav``, which only AudioSet's ids carry)."""
    for role, path in origin.files.items():
        for row in json_rows(path, "data"):
            name = row.text("id").removesuffix(".wav")
            part = {} if role == "file" else {"part": role}
            captions = row.texts("caption")
            sample_id = "/".join([*part.values(), name])
            yield Sample(sample_id, origin.locate(row.where, id=name, **part), captions, meta=_seconds(row))


def webvid(origin: Origin) -> Iterator[Sample]:
    """WebVid's CSV. Media fields: ``page_dir``, ``videoid``."""
    for path in origin.files.values():
        for row in table_rows(path):
            video = row.text("videoid")
            page = row.text("page_dir") if "page_dir" in row and row.values["page_dir"] else ""
            yield Sample(video, origin.locate(row.where, videoid=video, page_dir=page), (row.text("name"),))


def valor(origin: Origin) -> Iterator[Sample]:
    """VALOR's JSON: ``video_id`` and ``desc``, one text or several. Media field: ``video_id``."""
    for row in json_rows(origin.file("file")):
        name = row.text("video_id")
        yield Sample(name, origin.locate(row.where, video_id=name), row.texts("desc", "caption"))


def _seconds(row: Row) -> dict[str, float]:
    duration = row.values.get("duration")
    try:
        seconds = float(duration) if isinstance(duration, (int, float)) else math.nan
    except OverflowError:
        seconds = math.nan
    return {"seconds": seconds} if math.isfinite(seconds) else {}
