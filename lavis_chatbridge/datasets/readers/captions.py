"""Readers of captions: COCO, Flickr30k, NoCaps, MSRVTT, VATEX, AudioCaps, Clotho, WavCaps, WebVid, VALOR."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lavis_chatbridge.config import shown
from lavis_chatbridge.datasets.readers.common import Origin, is_list, object_rows, of_split, read_object, stem_of
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.schema import Sample

_log = logging.getLogger(__name__)


def coco_karpathy(origin: Origin) -> Iterator[Sample]:
    """COCO captions in Karpathy's split: his ``dataset_coco.json``, or LAVIS's ``coco_karpathy_{train,val,test}.json``.

    Option ``split`` (his file has all splits): ``train`` includes ``restval``. Media field: ``image``
    (``val2014/COCO_val2014_000000391895.jpg``). His ``dataset_flickr30k.json`` has the same format, without folders.
    """
    split = origin.options.get("split", "train")
    wanted = ("train", "restval") if split == "train" else (split,)
    for path in origin.every_file:
        if is_list(path):
            for position, row in enumerate(object_rows(path)):
                image = row.name("image")
                name = stem_of(os.path.basename(image))
                # LAVIS's training file has a row per caption, the others a row per image
                suffix = f"#{position}" if isinstance(row.values.get("caption"), str) else ""
                media = origin.locate(row.where, image=image)
                yield Sample(name + suffix, media, row.texts("caption"), meta={"image_id": name})
            continue
        for row in of_split(read_object(path).rows("images"), wanted, path):
            folder = f"{row.name('filepath')}/" if "filepath" in row else ""
            media = origin.locate(row.where, image=folder + row.name("filename"))
            captions = tuple(sentence.text("raw") for sentence in row.rows("sentences"))
            number = row.whole("cocoid", "imgid")
            yield Sample(str(number), media, captions, meta={"image_id": number})


def coco_annotations(origin: Origin) -> Iterator[Sample]:
    """COCO's own annotation format, also NoCaps': ``images``, and ``annotations`` with one caption each.

    NoCaps' ``domain`` of an image becomes ``meta.type``. Media field: ``file_name``.
    """
    captions = defaultdict(list)
    for row in origin.objects("annotations"):
        captions[row.whole("image_id")].append(row.text("caption"))
    for row in origin.objects("images"):
        number = row.whole("id")
        if number in captions:
            media = origin.locate(row.where, file_name=row.name("file_name"))
            meta = {"image_id": number} | ({"type": row.text("domain")} if "domain" in row else {})
            yield Sample(str(number), media, tuple(captions[number]), meta=meta)


def vatex(origin: Origin) -> Iterator[Sample]:
    """VATEX's JSON: ``videoID`` and ten English captions (``enCap``). Media field: ``video_id``."""
    for row in origin.objects():
        name = row.name("videoID")
        yield Sample(name, origin.locate(row.where, video_id=name), row.texts("enCap"))


def msrvtt(origin: Origin) -> Iterator[Sample]:
    """MSRVTT's ``videodatainfo``: ``videos`` with a split, ``sentences`` with captions.

    Option ``split`` (``train``, ``validate``, ``test``): the files of 2016 contain several. Media field: ``video_id``
    (``video7``).
    """
    split = origin.options.get("split")
    for path in origin.every_file:
        content = read_object(path)
        captions: dict[str, list[str]] = {row.name("video_id"): [] for row in content.rows("videos")}
        for row in content.rows("sentences"):
            if (name := row.name("video_id")) not in captions:
                raise DataError(f"{row.where}: video {shown(name)} is not among the videos")
            captions[name].append(row.text("caption"))
        videos = content.rows("videos")
        for row in videos if split is None else of_split(videos, (split,), path):
            if captions[name := row.name("video_id")]:
                yield Sample(name, origin.locate(row.where, video_id=name), tuple(captions[name]))


def audiocaps(origin: Origin) -> Iterator[Sample]:
    """AudioCaps' CSV. Media fields: ``audiocap_id``, ``youtube_id``, ``start_time`` (seconds).

    Validation and test files have five lines per sound; they become one sample.
    """
    sounds: dict[str, Sample] = {}
    for row in origin.table():
        name, caption = f"{row.name('youtube_id')}_{row.text('start_time')}", row.text("caption")
        if (known := sounds.get(name)) is not None:
            sounds[name] = replace(known, captions=(*known.captions, caption))
            continue
        fields = {"youtube_id": row.name("youtube_id"), "start_time": row.whole("start_time")}
        media = origin.locate(row.where, audiocap_id=row.whole("audiocap_id"), **fields)
        sounds[name] = Sample(row.text("audiocap_id"), media, (caption,))
    yield from sounds.values()


def clotho(origin: Origin) -> Iterator[Sample]:
    """Clotho's CSV: a file name and five captions. Media field: ``file_name`` (some begin with a blank)."""
    for row in origin.table():
        name = row.name("file_name")
        captions = tuple(row.text(f"caption_{number}") for number in range(1, 6))
        yield Sample(name, origin.locate(row.where, file_name=name), captions)


def wavcaps(origin: Origin) -> Iterator[Sample]:
    """WavCaps' JSON files, one per source. Media fields: ``id`` (without ``.wav``), ``part`` (the file's purpose).

    Option ``exclude``: the published list of clips that are in the test sets of AudioCaps and Clotho
    (``blacklist_exclude_all_ac.json``; a path below the data root). By default the reader looks for it in
    ``blacklist/`` beside the sources' folders, and warns if it does not exist; null uses all clips.
    """
    path = excluded_list(origin)
    if path is not None and not path.is_file() and not origin.options.get("exclude"):
        message = (
            "%s: %s does not exist, so training includes clips of AudioCaps' and Clotho's tests, and scores on these "
            "are not zero-shot; download it from data/json_files/blacklist of WavCaps"
        )
        _log.warning(message, origin.dataset, path)
        path = None
    lists: Mapping[str, Sequence[str]] = {} if path is None else read_object(str(path)).values
    for part, paths in origin.files.items():  # the lists say AudioSet, the files AudioSet_SL
        own = [names for source, names in lists.items() if _letters(source) in _letters(part)]
        excluded = {str(name).split(".")[0] for names in own for name in names}
        fields = {} if part == "file" else {"part": part}
        for row in (row for path in paths for row in read_object(path).rows("data")):
            name = row.name("id").removesuffix(".wav")
            if name not in excluded:
                media = origin.locate(row.where, id=name, **fields)
                yield Sample("/".join([*fields.values(), name]), media, row.texts("caption"))


def excluded_list(origin: Origin) -> Path | None:
    """The path of the list of clips that `wavcaps` leaves out (the file may not exist); None to use all clips."""
    chosen = origin.options.get("exclude", "")
    if chosen is None:
        return None
    published = Path(origin.every_file[0]).parents[1] / "blacklist" / "blacklist_exclude_all_ac.json"
    return Path(origin.root, chosen) if chosen else published


def _letters(name: str) -> str:
    return "".join(filter(str.isalpha, name.lower()))


def webvid(origin: Origin) -> Iterator[Sample]:
    """WebVid's CSV. Media fields: ``page_dir``, ``videoid``."""
    for row in origin.table():
        video = row.name("videoid")
        media = origin.locate(row.where, videoid=video, page_dir=row.name("page_dir", blank=True))
        yield Sample(video, media, (row.text("name"),))


def valor(origin: Origin) -> Iterator[Sample]:
    """VALOR's JSON: ``video_id`` and ``desc``, one text or several. Media field: ``video_id``."""
    for row in origin.objects():
        name = row.name("video_id")
        yield Sample(name, origin.locate(row.where, video_id=name), row.texts("desc", "caption"))
