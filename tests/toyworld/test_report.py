"""The demo's report: figures taken from the runs' files, the page complete, a missing run named."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from lavis_chatbridge.errors import DataError

SCRIPTS = Path(__file__).resolve().parents[2] / "projects" / "toyworld"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(SCRIPTS))
    report = import_module("report")
FACTS = {"image": {"colour": "red"}, "video": {"motion": "up"}, "audio": {"pitch": "low"}}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def scored(run: Path, split: str, score: dict, records: list[dict]) -> None:
    (run / "result").mkdir(parents=True, exist_ok=True)
    (run / "result" / f"{split}_step0.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    percent = {name: 100 * value for name, value in score.items()}
    chance = {"chance": percent.pop("text_prior")} if "text_prior" in percent else {}
    by_source = {record["source"]: {"scores": percent, **chance} for record in records}
    write_json(run / "result" / f"{split}_step0_metrics.json", {"by_source": by_source})


def captions(split: str) -> list[dict]:
    return [
        {
            "sample_id": f"{modality}_{split}_00000",
            "source": f"world/{modality}",
            "facts": facts,
            "prediction": "a red thing" if modality == "image" else "nothing",
            "prompt": "",
        }
        for modality, facts in FACTS.items()
    ]


def joint(right: dict[str, bool]) -> list[dict]:
    return [
        {
            "sample_id": "joint_00000_name",
            "source": "world_joint",
            "answers": ["red and low"],
            "facts": {},
            "meta": {"asked": kind},
            "prediction": "Red and low." if good else "blue and low",
            "prompt": "###Human: Given following image: [image 0].###Human: name both###Assistant:",
        }
        for kind, good in right.items()
    ]


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    world = tmp_path / "world"
    (world / "annotations").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(world / "a.png")
    for split in ("test", "heldout"):
        for modality in FACTS:
            line = {"id": f"{modality}_{split}_00000", "media": [{"type": modality, "path": "a.png"}]}
            (world / "annotations" / f"{modality}_{split}.jsonl").write_text(json.dumps(line) + "\n")
    line = {"id": "joint_00000_name", "media": [{"type": "image", "path": "a.png"}]}
    (world / "annotations" / "joint_test.jsonl").write_text(json.dumps(line) + "\n")
    folder = tmp_path / "demo"
    for number, split in enumerate(("test", "heldout")):
        score = {"attribute_accuracy": 0.9 - number / 10, "text_prior": 0.25}
        scored(folder / "stage1_scores", split, score, captions(split))
    scored(folder / "stage1_scores", "test_shuffled_image_video_audio", {"attribute_accuracy": 0.26}, captions("test"))
    (folder / "stage1").mkdir()
    (folder / "stage1" / "log.txt").write_text(
        '{"train_step": 1, "train_loss": 3.5}\n{"train_step": 9, "train_loss": 1.5}\n'
    )
    return folder


def add_stage2(folder: Path) -> None:
    for split in ("test", "heldout"):
        scored(folder / "stage2_scores", split, {"exact_match": 0.75}, captions(split))
    every = dict.fromkeys(("name", "compose", "match", "compare", "conditional"), True)
    scored(folder / "joint", "test", {}, joint(every | {"match": False, "compare": False}))
    scored(folder / "joint", "words", {}, joint(every))
    for right, withheld in enumerate(("image_video", "audio", "image_video_audio")):
        answers = dict.fromkeys(every, False) | dict.fromkeys(list(every)[: 2 - right], True)
        scored(folder / "joint", f"test_withheld_{withheld}", {}, joint(answers))


def test_stage_1_figures_come_from_the_runs(demo: Path) -> None:
    found = report.write_report(demo, demo.parent / "world")
    expected = {
        "accuracy": pytest.approx(0.9),
        "heldout": pytest.approx(0.8),
        "shuffled": pytest.approx(0.26),
        "text_prior": 0.25,
    }
    assert found["stage1"] == dict.fromkeys(("image", "video", "audio"), expected)
    assert json.loads((demo / "report.json").read_text())["stage1"]["audio"]["shuffled"] == pytest.approx(0.26)
    page = (demo / "report.html").read_text()
    assert "from 3.500 to 1.500" in page
    assert "a red thing" in page


def test_joint_figures_count_the_composing_kinds(demo: Path) -> None:
    add_stage2(demo)
    found = report.write_report(demo, demo.parent / "world")
    assert found["stage2"]["video"] == {"accuracy": 0.75, "heldout": 0.75}
    assert found["joint"]["both"] == pytest.approx(2 / 3)
    assert found["joint"]["no_vision"] == pytest.approx(2 / 3)
    assert found["joint"]["no_audio"] == pytest.approx(1 / 3)
    assert found["joint"]["neither"] == 0.0
    assert found["joint"]["by_kind"]["compare"] == 0.0
    assert found["joint"]["text_only"]["compare"] == 1.0
    assert "joint both" in report.summary(found)


def test_a_missing_run_is_named(demo: Path) -> None:
    (demo / "stage1_scores" / "result" / "test_shuffled_image_video_audio_step0_metrics.json").unlink()
    with pytest.raises(DataError, match=r"result has no test_shuffled_image_video_audio_step\*_metrics.json: run the"):
        report.write_report(demo, demo.parent / "world")


def test_the_page_is_complete_and_escapes_words(demo: Path) -> None:
    for record in (records := captions("test")):
        record["prediction"] = "<b>red</b>"
    scored(demo / "stage1_scores", "test", {"attribute_accuracy": 0.9, "text_prior": 0.25}, records)
    report.write_report(demo, demo.parent / "world")
    page = (demo / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", page)
    assert "data:image/png;base64," in page
    assert "&lt;b&gt;red&lt;/b&gt;" in page
    assert "<b>" not in page
