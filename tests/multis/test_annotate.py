"""Annotation: files in the forms that GRIT and Semantic-SAM write, merging, shards, resuming, unreadable media."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.multis.annotate import annotate
from lavis_chatbridge.multis.annotation import Region, read_annotations
from lavis_chatbridge.multis.annotators import Findings, Imported, Options, View, build_annotator
from tests.media.making import tone, video_file

WIDTH, HEIGHT = 200, 100
BOTH = ["video", "audio"]
ITEMS = {"picture": ["image"], "clip": ["video"], "sound": ["audio"], "x": BOTH, "y": BOTH}


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``items.jsonl``: an image, a video, a sound, and two videos (``x``, ``y``) with their sounds."""
    folder = tmp_path_factory.mktemp("items")
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "a.mp4").write_bytes(video_file(sound=tone(1.2, 48_000)))
    lines = []
    for name, modalities in ITEMS.items():
        media = [{"type": m, "path": "a.png" if m == "image" else "a.mp4"} for m in modalities]
        heard = {"sound_captions": ["A tone."]} if len(media) == 2 else {}
        lines.append(json.dumps({"id": name, "media": media, "captions": ["A caption."], "licence": "CC0", **heard}))
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "items.jsonl"


def view(item: str = "clip", path: str = "videos/clip.mp4", number: int = 0) -> View:
    return View(item, "image", path, np.zeros((HEIGHT, WIDTH, 3), np.uint8), number)


def imported(tmp_path: Path, content: Any, form: Any, **options: Any) -> Imported:
    (tmp_path / "made.json").write_text(json.dumps(content))
    return Imported(str(tmp_path / "made.json"), Options(**options), form)


@pytest.mark.parametrize(
    "content",
    [
        {"clip/0": [{"box": [20, 10, 100, 50], "description": "a red ball", "score": 0.5}]},
        {"clip": {"bbox": [20, 10, 80, 40], "caption": "a red ball", "score": 0.5}},
        {"videos/clip.mp4": [{"box": [0.1, 0.1, 0.5, 0.5], "text": "a red ball", "logits": 0.5}]},
        [{"image_id": "clip.mp4", "bbox": [20, 10, 80, 40], "object_descriptions": ["a red ball"], "score": 0.5}],
    ],
)
def test_region_captions_are_read_in_every_known_form(tmp_path: Path, content: Any) -> None:
    importer = imported(tmp_path, content, "grit")
    assert importer.annotate(view()).regions == (Region(text="a red ball", box=(0.1, 0.1, 0.5, 0.5)),)
    assert importer.annotate(view("other", "o.mp4")) == importer.annotate(view(number=1)) == Findings()


def test_the_best_regions_and_largest_masks_are_kept(tmp_path: Path) -> None:
    regions = [{"box": [0, 0, 9, 9], "text": f"thing {n}", "score": n / 10} for n in range(10)]
    found = imported(tmp_path, {"clip": regions}, "grit", largest=2).annotate(view())
    assert [region.text for region in found.regions] == ["thing 9", "thing 8"]
    masks = [{"area": 8000, "class_name": "grass"}, {"area": 5000, "label": "sky"}, {"area": 2000, "label": "grass"}]
    importer = imported(tmp_path, {"clip": [*masks, {"area": 0.01, "name": "sun"}]}, "semantic_sam", largest=2)
    assert importer.annotate(view()).semantics == {"grass": 0.5, "sky": 0.25}, "in shares of the frame"


@pytest.mark.parametrize(
    "content",
    [
        {"clip": ["a bell rings", {"caption": "two strokes"}]},
        [{"audio_id": "clip", "caption": "a bell rings"}, {"audio_id": "clip", "text": "two strokes"}],
    ],
)
def test_captions_and_tags_are_imported(tmp_path: Path, content: Any) -> None:
    assert imported(tmp_path, content, "captions").annotate(view()).caption == "a bell rings"
    heard = imported(tmp_path, content, "sound_captions").annotate(view()).sound_captions
    assert heard == ("a bell rings", "two strokes")
    tags = imported(tmp_path, {"clip": ["Dog", {"label": "Rain", "score": 0.9}]}, "tags")
    assert tags.annotate(view()).tags == ("Rain", "Dog")


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("grit", [{"box": [1, 2, 3, 4]}], "has no view name"),
        ("grit", {"clip": [{"text": "x", "box": [1, 2]}]}, "entry of 'clip' is not of the form 'grit'"),
        ("captions", {"clip": [7]}, "entry of 'clip' is not of the form 'captions'"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, form: Any, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        imported(tmp_path, content, form).annotate(view())


def test_findings_are_added_and_signed(items: Path, tmp_path: Path) -> None:
    (tmp_path / "seen.json").write_text(json.dumps({"x/1": "a square"}))
    (tmp_path / "heard.json").write_text(json.dumps({"x": ["a flute", "a long tone"]}))
    names = (f"captions={tmp_path}/seen.json", f"sound_captions={tmp_path}/heard.json")
    annotate(items, tmp_path / "out", [build_annotator(name) for name in names])
    done = {one.id: one for one in read_annotations(tmp_path / "out")}
    both, other, sound = done["x"], done["y"], done["sound"]
    assert [frame.caption for frame in both.frames] == ["", "a square", ""]
    assert both.sound_captions == ("A tone.", "a flute", "a long tone")
    assert both.written_by["sound_captions"] == "human, sound_captions import heard.json"
    assert other.written_by["sound_captions"] == "human"
    assert (sound.captions, sound.sound_captions, sound.licence) == ((), ("A caption.",), "CC0")


class Counting:
    """An annotator of a user's own."""

    name = "counting 1"
    modality = "image"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def annotate(self, view: View) -> Findings:
        self.seen.append(view.item)
        assert view.content.ndim == 3
        return Findings(caption=f"frame {view.number}")


def test_ranks_cover_every_item_once_and_resume(items: Path, tmp_path: Path) -> None:
    reports = [annotate(items, tmp_path, [Counting()], rank=rank, world=3) for rank in range(3)]
    assert sum(report.annotated for report in reports) == 5
    done = {one.id: one for one in read_annotations(tmp_path)}
    assert done.keys() == ITEMS.keys()
    both = done["y"]
    assert [frame.position for frame in both.frames] == [0.1667, 0.5, 0.8333]
    assert [frame.caption for frame in both.frames] == ["frame 0", "frame 1", "frame 2"]
    assert both.written_by == {"captions": "human", "sound_captions": "human", "frames.caption": "counting 1"}
    again = Counting()
    assert annotate(items, tmp_path, [again]).known == 5, "another number of processes finds the same items finished"
    assert again.seen == []


def test_an_item_whose_line_was_cut_off_is_annotated_again(items: Path, tmp_path: Path) -> None:
    annotate(items, tmp_path, [Counting()])
    [file] = tmp_path.glob("annotations-*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20] + "é".encode()[:1])
    assert len(list(read_annotations(tmp_path))) == 4
    again = Counting()
    assert annotate(items, tmp_path, [again])[:2] == (1, 4)
    assert set(again.seen) == {"y"}
    assert [one.id for one in read_annotations(tmp_path)] == [json.loads(line)["id"] for line in whole.splitlines()]
    assert annotate(items, tmp_path, [Counting()])[:2] == (0, 5)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["../a.png"], "items.jsonl:1.* leaves the media root"),
        (["file:///etc/passwd"], "items.jsonl:1.* is a URL"),
        (["a.png", "a.png"], "items.jsonl:2: the id 'a' occurs twice"),
    ],
)
def test_faulty_items_are_refused(tmp_path: Path, paths: list[str], message: str) -> None:
    lines = [json.dumps({"id": "a", "media": [{"type": "image", "path": path}]}) for path in paths]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        annotate(tmp_path / "items.jsonl", tmp_path / "out", [])


def test_unreadable_media_are_named_and_left_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["bad.jpg", "none.jpg", "link.png"]
    items = [{"id": name, "media": [{"type": "image", "path": name}]} for name in names]
    (root / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    report = annotate(root / "items.jsonl", tmp_path / "out", [Counting()])
    assert (report.annotated, report.failed) == (0, 3)
    failures = [json.loads(line) for file in (tmp_path / "out").glob("failures*") for line in file.open()]
    assert [failure["id"] for failure in failures] == names
    assert "none.jpg" in failures[1]["reason"]
    assert "leads out of the media root" in failures[2]["reason"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("florence=x", "did you mean 'florence2'"),
        ("grit", "needs a path"),
        ("grit=x.json,larges=3", "unknown key annotators.grit.larges, did you mean 'largest'"),
        ("grit=x.json,largest=all", "annotators.grit.largest: expected int, found 'all'"),
        ("captioner=/nowhere", "/nowhere cannot be loaded for image-text-to-text"),
        ("grit=/nowhere.json", "/nowhere.json: cannot be read"),
    ],
)
def test_a_wrong_annotator_is_named_with_its_remedy(text: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        build_annotator(text)
    assert type(error.value).__module__.startswith("lavis_chatbridge")
