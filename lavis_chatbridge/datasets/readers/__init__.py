"""One short reader per public annotation format: reads the published files and yields samples.

A reader raises `DataError` with the position of a fault. It opens no media: the configuration has the media's paths and
the data set's task.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lavis_chatbridge.datasets.readers import captions, choices, own, questions, web
from lavis_chatbridge.datasets.readers.common import Origin, Reader, with_unique_ids

VERSION = 6
"""Increase it when a reader's samples change, so that annotations are converted again."""

_NAMES = {
    captions: "audiocaps clotho coco_annotations coco_karpathy msrvtt valor vatex wavcaps webvid",
    questions: "avsd gqa llava msrvtt_qa multis music_avqa visual_genome vqav2",
    choices: "av_odyssey avhbench avqa charades_ego daily_omni mmau mosi omnibench video_mme worldsense",
    own: "huggingface messages",
    web: "pairs_json pairs_tsv webdataset",
}
READERS: dict[str, Reader] = {
    name: with_unique_ids(getattr(module, name)) for module, names in _NAMES.items() for name in names.split()
}
"""Name in a configuration -> reader. ``jsonl`` (our own schema) needs none."""

OPTIONS: dict[str, tuple[str, ...]] = {"jsonl": (), **dict.fromkeys(READERS, ())} | {
    "avsd": ("each_turn", "undisclosed"),
    "charades_ego": ("egocentric",),
    "coco_karpathy": ("split",),
    "huggingface": ("columns", "split", "name", "revision"),
    "llava": ("messages",),
    "mosi": ("split", "classes", "transcript"),
    "msrvtt": ("split",),
    "multis": ("messages",),
    "pairs_tsv": ("columns",),
    "wavcaps": ("exclude",),
}
"""Reader -> the options that it reads; those of a reader added to `READERS` are not checked."""

READS_TOO: dict[str, Callable[[Origin], Path | None]] = {"wavcaps": captions.excluded_list}
"""Reader -> an additional file that it reads, which no split names."""
