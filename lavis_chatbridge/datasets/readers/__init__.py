"""One short reader per public annotation format: files in their published layout -> samples.

A reader is a generator of samples that raises `DataError` with the position of a fault. It opens no medium: the
configuration names the media's paths and the data set's task.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lavis_chatbridge.datasets.readers import captions, chats, options, own, questions, web
from lavis_chatbridge.datasets.readers.common import Origin, Reader, with_unique_ids

VERSION = 5
"""Increase it when a reader's samples change, so that annotations are converted again."""

READERS: dict[str, Reader] = {
    "audiocaps": with_unique_ids(captions.audiocaps),
    "av_odyssey": with_unique_ids(options.av_odyssey),
    "avhbench": with_unique_ids(options.avhbench),
    "avqa": with_unique_ids(options.avqa),
    "avsd": with_unique_ids(chats.avsd),
    "charades_ego": with_unique_ids(options.charades_ego),
    "clotho": with_unique_ids(captions.clotho),
    "coco_annotations": with_unique_ids(captions.coco_annotations),
    "coco_karpathy": with_unique_ids(captions.coco_karpathy),
    "daily_omni": with_unique_ids(options.daily_omni),
    "gqa": with_unique_ids(questions.gqa),
    "huggingface": with_unique_ids(own.huggingface),
    "llava": with_unique_ids(chats.llava),
    "messages": with_unique_ids(own.messages),
    "mmau": with_unique_ids(options.mmau),
    "mosi": with_unique_ids(options.mosi),
    "msrvtt": with_unique_ids(captions.msrvtt),
    "msrvtt_qa": with_unique_ids(questions.msrvtt_qa),
    "multis": with_unique_ids(chats.multis),
    "music_avqa": with_unique_ids(questions.music_avqa),
    "omnibench": with_unique_ids(options.omnibench),
    "pairs_json": web.pairs_json,
    "pairs_tsv": web.pairs_tsv,
    "valor": with_unique_ids(captions.valor),
    "vatex": with_unique_ids(captions.vatex),
    "video_mme": with_unique_ids(options.video_mme),
    "visual_genome": with_unique_ids(questions.visual_genome),
    "vqav2": with_unique_ids(questions.vqav2),
    "wavcaps": with_unique_ids(captions.wavcaps),
    "webdataset": web.webdataset,
    "webvid": with_unique_ids(captions.webvid),
    "worldsense": with_unique_ids(options.worldsense),
}
"""Name in a configuration -> reader. ``jsonl`` (our own schema) needs none."""

READS_TOO: dict[str, Callable[[Origin], Path | None]] = {"wavcaps": captions.excluded_list}
"""Reader -> an additional file that it reads, which no split names."""

__all__ = ["READERS", "READS_TOO", "VERSION", "Origin", "Reader"]
