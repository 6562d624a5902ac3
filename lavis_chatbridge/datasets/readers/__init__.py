"""One short reader per public annotation format: files in their published layout -> samples.

A reader is a generator over samples; what is malformed raises `DataError` with its position. Readers open no medium
and know no task of ours: the configuration says where media lie and what a data set is for.
"""

from __future__ import annotations

from lavis_chatbridge.datasets.readers import captions, chats, options, questions, web
from lavis_chatbridge.datasets.readers.common import Origin, Reader

VERSION = 4
"""Raised whenever a reader would give other samples; what was converted before is then converted anew."""

READERS: dict[str, Reader] = {
    "audiocaps": captions.audiocaps,
    "av_odyssey": options.av_odyssey,
    "avhbench": options.avhbench,
    "avqa": options.avqa,
    "avsd": chats.avsd,
    "charades_ego": options.charades_ego,
    "clotho": captions.clotho,
    "coco_annotations": captions.coco_annotations,
    "coco_karpathy": captions.coco_karpathy,
    "daily_omni": options.daily_omni,
    "gqa": questions.gqa,
    "llava": chats.llava,
    "mmau": options.mmau,
    "mosi": options.mosi,
    "msrvtt": captions.msrvtt,
    "msrvtt_qa": questions.msrvtt_qa,
    "multis": chats.multis,
    "music_avqa": questions.music_avqa,
    "omnibench": options.omnibench,
    "pairs_json": web.pairs_json,
    "pairs_tsv": web.pairs_tsv,
    "valor": captions.valor,
    "vatex": captions.vatex,
    "video_mme": options.video_mme,
    "visual_genome": questions.visual_genome,
    "vqav2": questions.vqav2,
    "wavcaps": captions.wavcaps,
    "webdataset": web.webdataset,
    "webvid": captions.webvid,
    "worldsense": options.worldsense,
}
"""Name in a configuration -> reader. ``jsonl`` (our own schema) needs none."""

__all__ = ["READERS", "VERSION", "Origin", "Reader"]
