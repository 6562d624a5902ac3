"""Hostile inputs: a seeded part of what ``benchmarks/fuzz.py`` feeds; each ends in a result or one of our exceptions.

What must hold beside that (nothing half loaded, no code run, no path outside the root, no forged slot) is asserted
where the inputs are fed, in ``tests/fuzzing``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzzing.targets import TARGETS

COUNTS = {"configurations": 12, "templates": 20}
OPENED = {
    "feature cache": {  # as shards that are cut off: passed over, and made anew
        "features of 10^15 bytes",
        "features at byte 2^70",
    },
    "image": {
        "PNG: as many pixels as allowed in 39 kB",
        "PNG 100,000 pixels wide",
        "PNG 100,000 pixels high, 1 wide",
        "GIF of no size",
        "TIFF of 2^32 - 1 rows per strip",
    },
    "video": {
        "mp4 that claims 10 hours",
        "mp4 that claims 65,535 x 65,535",
        "mp4 of no size",
        "mp4 whose frames last no time",
        "mp4 whose one frame lasts 2^32 units",
        "mp4 whose box is larger than the file",
        "AVI that claims 2^32 - 1 frames",
        "AVI that claims 2^31 x 2^31",
        "AVI of no size",
        "AVI of no frames a second",
        "mkv that claims 10^30 seconds",
        "mkv whose duration is no number",
        "mkv that claims 65,535 wide",
        "GIF of 5,000 frames",
        "TIFF whose pages go in a circle",
    },
    "audio": {"wav that claims 10 hours", "wav that claims 2^32 - 1 bytes", "wav of 767,957 Hz, a prime"},
    "JSONL": {"offset beyond 2^63", "size of 10^15 bytes"},
    "shards": {
        "text of 8 GiB that is a hole",
        "names that climb out",
        "absolute names",
        "name of 100,000 characters",
        "20,000 empty members",
    },
    "MULTIS imports": {
        "item whose name climbs out",
        "item whose name holds NUL",
        "item whose name is not Unicode",
        "region of infinite size",
    },
    "requests": {"100,000 messages", "lone surrogates", "medium of letters on lines of their own"},
    "prompts": set(TARGETS["prompts"].cases),
    "LAVIS checkpoints": {"no optimiser"},
}
"""The special cases that are opened all the same: what they lie about is not believed. All others are refused."""
SLOW = {
    "GIF of 1,800,000 frames",
    "GIF with a comment of 5 million blocks",
    "GIF whose one frame has 5 million blocks",
    "TIFF of 1,000,000 empty pages",
    "TIFF of 120,000 pages",
    "mp4 with 10 hours of silence",
    "flac of 2 hours of silence",
    "flac of 2 hours that states no length",
    "ogg of 1 hour of silence",
    "20,000 empty members",
    "bare pickle of 1 GiB in 1 MB",
    "pickle of 1 GiB in 1 MB",
    "medium of escapes",
    "100,000 messages",
    "100,000 media",
    "file of line ends",
    "PNG bomb: 60,000 x 60,000 pixels in 450 kB",
    "PNG with 256 MB of compressed text",
    "PNG with a colour profile of 256 MB",
    "PNG with 256 MB of international text",
    "GIF that begins with a comment of 5 million blocks",
}
"""Special cases that take a second or more to make or to feed: left to the benchmark."""


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs(name: str, tmp_path: Path) -> None:
    target, found = TARGETS[name], Counter[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(COUNTS.get(name, 30)):
            folder = tmp_path / str(number)
            folder.mkdir()
            found[target.outcome(target.input(20_231, number), folder)] += 1
    refused = sum(found.values()) - found["result"]
    assert refused or name == "prompts"
    assert found["result"] or name == "configurations"


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, target in TARGETS.items() for case in target.cases if case not in SLOW]
)
def test_special_cases(name: str, case: str, tmp_path: Path) -> None:
    outcome = TARGETS[name].outcome(TARGETS[name].input(0, case), tmp_path)
    assert (outcome == "result") == (case in OPENED.get(name, ())), outcome


def test_the_lists_name_cases_that_there_are() -> None:
    every = {case for target in TARGETS.values() for case in target.cases}
    assert set().union(*OPENED.values()) | SLOW <= every


def test_an_input_is_its_seed_and_number() -> None:
    for name in ("image", "weights", "requests"):
        target = TARGETS[name]
        assert target.input(3, 5) == target.input(3, 5) != target.input(4, 5)
