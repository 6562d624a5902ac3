"""Annotation: files in the forms that GRIT and Semantic-SAM write, merging, shards, resuming, unreadable media."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.multis.annotate import annotate
from lavis_chatbridge.multis.annotation import Region, Semantic, Tag, read_annotations
from lavis_chatbridge.multis.annotators import Findings, Imported, View, build_annotator

WIDTH, HEIGHT = 200, 100
MASK = {"size": [HEIGHT, WIDTH], "counts": "x"}


def view(item: str = "clip", number: int = 0, kind: Any = "frame", path: str = "videos/clip.mp4") -> View:
    return View(item, kind, path, lambda: np.zeros((HEIGHT, WIDTH, 3), np.uint8), number)


def imported(tmp_path: Path, content: Any, form: Any, **options: Any) -> Imported:
    (tmp_path / "made.json").write_text(json.dumps(content))
    return Imported(tmp_path / "made.json", form, **options)


@pytest.mark.parametrize(
    "content",
    [
        {"clip/0": [{"box": [20, 10, 100, 50], "description": "a red ball", "score": 0.5}]},
        {"clip_0": [{"bbox": [20, 10, 80, 40], "caption": "a red ball", "score": 0.5}]},
        {"videos/clip.mp4": [{"box": [0.1, 0.1, 0.5, 0.5], "text": "a red ball", "logits": 0.5}]},
        [{"image_id": "clip", "bbox": [20, 10, 80, 40], "object_descriptions": ["a red ball"], "score": 0.5}],
        [{"image": "clip.mp4", "regions": [{"bbox": [20, 10, 80, 40], "phrase": "a red ball", "score": 0.5}]}],
        {"image": "clip", "width": 400, "height": 200, "regions": [
            {"box": [40, 20, 200, 100], "text": "a red ball", "score": 0.5},
        ]},
    ],
)  # fmt: skip
def test_region_captions_are_read_in_every_known_form(tmp_path: Path, content: Any) -> None:
    found = imported(tmp_path, content, "grit").annotate(
        [view(), view("other", path="o.mp4"), view(number=1, item="x")]
    )
    assert found[0].regions == (Region(text="a red ball", box=(0.1, 0.1, 0.5, 0.5), score=0.5),)
    assert found[1:] == [Findings(), Findings()]


def test_the_best_regions_are_kept(tmp_path: Path) -> None:
    regions = [{"box": [0, 0, 9, 9], "text": f"thing {n}", "score": n / 10} for n in range(10)]
    found = imported(tmp_path, {"clip": regions}, "grit", largest=2, least_score=0.1).annotate([view()])
    assert [region.text for region in found[0].regions] == ["thing 9", "thing 8"]


@pytest.mark.parametrize(
    "content",
    [
        {"clip": [  # Semantic-Segment-Anything: a list of masks in SAM's form, with class names
            {"segmentation": MASK, "bbox": [0, 0, 9, 9], "area": 8000, "class_name": "grass"},
            {"segmentation": MASK, "bbox": [0, 0, 9, 9], "area": 5000, "class_name": "sky"},
            {"segmentation": MASK, "bbox": [0, 0, 9, 9], "area": 2000, "class_name": "grass"},
        ]},
        {"image": {"file_name": "clip.mp4", "width": WIDTH, "height": HEIGHT}, "annotations": [
            {"area": 10_000, "label": "grass"}, {"area": 5000, "label": "sky"},
        ]},
    ],
)  # fmt: skip
def test_masks_become_shares_of_the_frame(tmp_path: Path, content: Any) -> None:
    found = imported(tmp_path, content, "semantic_sam").annotate([view()])
    assert found[0].semantics == (Semantic(label="grass", share=0.5), Semantic(label="sky", share=0.25))


def test_captions_and_tags_are_imported(tmp_path: Path) -> None:
    assert imported(tmp_path, {"clip": "a frame"}, "captions").annotate([view()])[0].caption == "a frame"
    tags = imported(tmp_path, {"clip": ["Dog", ["Bark", 0.5], {"label": "Rain", "score": 0.9}]}, "tags")
    found = tags.annotate([view(kind="sound")])[0].tags
    assert [(tag.label, tag.score) for tag in found] == [("Rain", 0.9), ("Bark", 0.5), ("Dog", None)]
    assert tags.kind == "sound"
    assert Tag(label="Dog") in found


@pytest.mark.parametrize(
    "content",
    [
        {"bell": ["a bell rings", {"caption": "two strokes"}]},
        {"sounds/bell.wav": {"captions": ["a bell rings", " two strokes "]}},
        [{"audio_id": "bell", "caption": "a bell rings"}, {"audio_id": "bell", "text": "two strokes"}],
        [{"file_name": "bell.wav", "captions": ["a bell rings", "two strokes"]}],
    ],
)
def test_captions_of_sounds_are_imported(tmp_path: Path, content: Any) -> None:
    importer = imported(tmp_path, content, "sound_captions")
    views = [view("bell", kind="sound", path="sounds/bell.wav"), view("other", kind="sound", path="other.wav")]
    assert importer.kind == "sound"
    assert [one.sound_captions for one in importer.annotate(views)] == [("a bell rings", "two strokes"), ()]


def test_imported_captions_go_to_the_frames_and_to_the_sounds(world: Path, tmp_path: Path) -> None:
    (tmp_path / "seen.json").write_text(json.dumps({"both0/1": "a square"}))
    (tmp_path / "heard.json").write_text(json.dumps({"both0": ["a flute", "a long tone"]}))
    annotators = [
        build_annotator(f"captions={tmp_path}/seen.json"),
        build_annotator(f"sound_captions={tmp_path}/heard.json"),
    ]
    annotate(world / "items.jsonl", tmp_path / "out", annotators)
    done = {one.id: one for one in read_annotations(tmp_path / "out")}
    both, other = done["both0"], done["both1"]
    assert [frame.caption for frame in both.frames] == ["", "a square", ""]
    assert both.sound_captions[-2:] == ("a flute", "a long tone")
    assert len(both.sound_captions) > 2, "what people wrote stays"
    assert both.written_by["sound_captions"] == "human, sound_captions import heard.json"
    assert other.written_by["sound_captions"] == "human"


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
        imported(tmp_path, content, form).annotate([view()])


class Counting:
    """An annotator of a user's own."""

    name = "counting 1"
    kind = "frame"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        self.seen.append(views[0].item)
        shapes = [view.content.shape for view in views]
        assert all(len(shape) == 3 for shape in shapes)
        return [Findings(caption=f"frame {view.number} of {len(views)}") for view in views]


def test_ranks_cover_every_item_once_and_resume(world: Path, tmp_path: Path) -> None:
    items, out = world / "items.jsonl", tmp_path / "out"
    parts = [Counting() for _ in range(3)]
    reports = [annotate(items, out, [part], rank=rank, world=3) for rank, part in enumerate(parts)]
    assert sum(report.annotated for report in reports) == 8
    done = {one.id: one for one in read_annotations(out)}
    assert len(done) == 8
    both = done["both1"]
    assert [(frame.position, frame.caption) for frame in both.frames] == [
        (0.1667, "frame 0 of 3"),
        (0.5, "frame 1 of 3"),
        (0.8333, "frame 2 of 3"),
    ]
    assert both.written_by == {"captions": "human", "sound_captions": "human", "frames.caption": "counting 1"}
    again = Counting()
    assert annotate(items, out, [again]).known == 8, "another number of processes finds the same items finished"
    assert again.seen == []


def test_captions_of_a_sound_become_sound_captions(world: Path, tmp_path: Path) -> None:
    annotate(world / "items.jsonl", tmp_path, [])
    sound = next(one for one in read_annotations(tmp_path) if one.modality == "audio")
    assert sound.captions == ()
    assert sound.sound_captions
    assert sound.licence == "CC0"


def test_unreadable_media_are_named_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    items = [
        {"id": str(n), "media": [{"type": "image", "path": name}]} for n, name in enumerate(["bad.jpg", "none.jpg"])
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    report = annotate(tmp_path / "items.jsonl", tmp_path / "out", [Counting()])
    assert (report.annotated, report.failed) == (0, 2)
    failures = [json.loads(line) for file in (tmp_path / "out").glob("failures*") for line in file.open()]
    assert [failure["id"] for failure in failures] == ["0", "1"]
    assert "none.jpg" in failures[1]["reason"]


def test_a_repeated_id_is_refused(tmp_path: Path) -> None:
    line = json.dumps({"id": "a", "media": [{"type": "image", "path": "a.png"}]})
    (tmp_path / "items.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(DataError, match=r"items.jsonl:2: the id 'a' occurs twice"):
        annotate(tmp_path / "items.jsonl", tmp_path / "out", [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("florence=x", "did you mean 'florence2'"),
        ("grit", "needs a path"),
        ("grit=x.json,larges=3", "did you mean 'largest'"),
        ("captioner=/nowhere", "/nowhere cannot be loaded for image-text-to-text"),
        ("grit=/nowhere.json", "cannot read /nowhere.json"),
    ],
)
def test_a_wrong_annotator_is_named_with_its_remedy(text: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        build_annotator(text)
    assert type(error.value).__module__.startswith("lavis_chatbridge")


def test_options_of_an_annotator_are_read(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(json.dumps({"clip": [{"text": str(n), "box": [0, 0, 1, 1]} for n in range(5)]}))
    assert len(build_annotator(f"grit={tmp_path}/g.json,largest=2").annotate([view()])[0].regions) == 2


@pytest.mark.parametrize("path", ["../a.png", "/etc/passwd", "file:///etc/passwd", "a\0.png", ""])
def test_media_outside_the_root_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps({"id": "a", "media": [{"type": "image", "path": path}]}))
    with pytest.raises(DataError, match=r"leaves the media root|is a URL|NUL|expected the path of a file"):
        annotate(tmp_path / "items.jsonl", tmp_path / "out", [])


def test_links_that_lead_out_of_the_root_leave_an_item_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "a.png").symlink_to(tmp_path / "secret.png")
    (root / "items.jsonl").write_text(json.dumps({"id": "a", "media": [{"type": "image", "path": "a.png"}]}))
    assert annotate(root / "items.jsonl", tmp_path / "out", []).failed == 1
    assert "leads out of the media root" in next((tmp_path / "out").glob("failures-*")).read_text()
