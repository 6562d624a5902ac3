"""The demo's report: scores taken from the runs' files, the page complete, a missing run named."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import write_json

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "projects" / "toyworld"))
    report = import_module("report")
FACTS = {"image": {"colour": "red"}, "video": {"motion": "up"}, "audio": {"pitch": "low"}}
KINDS = ("name", "compose", "match", "compare", "conditional")


def scored(run: Path, split: str, records: list[dict], chance: float | None = None, **scores: float) -> None:
    """The files of an evaluation: predictions, and scores in percent of each source."""
    (run / "result").mkdir(parents=True, exist_ok=True)
    (run / "result" / f"{split}_step0.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"scores": scores} | ({} if chance is None else {"chance": chance})
    by_source = {record["source"]: entry for record in records}
    write_json(run / "result" / f"{split}_step0_metrics.json", {"by_source": by_source})


def captions(split: str) -> list[dict]:
    caption = {"prediction": "a <b>red</b> thing", "prompt": ""}
    return [
        {"sample_id": f"{modality}_{split}_00000", "source": f"world/{modality}", "facts": facts, **caption}
        for modality, facts in FACTS.items()
    ]


def joint(*right: str) -> list[dict]:
    prompt = "###Human: Given following image: [image 0].###Human: name both###Assistant:"
    asked = {"sample_id": "joint_00000_name", "source": "world_joint", "answers": ["red and low"], "prompt": prompt}
    texts = {kind: "Red and low." if kind in right else "blue and low" for kind in KINDS}
    return [asked | {"facts": {}, "meta": {"asked": kind}, "prediction": text} for kind, text in texts.items()]


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    annotations = tmp_path / "world" / "annotations"
    annotations.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "world" / "a.png")
    files = {f"{m}_{split}": (m, f"{m}_{split}_00000") for m in FACTS for split in ("test", "heldout")}
    for name, (modality, sample) in (files | {"joint_test": ("image", "joint_00000_name")}).items():
        line = {"id": sample, "media": [{"type": modality, "path": "a.png"}]}
        (annotations / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    folder = tmp_path / "demo"
    scored(folder / "stage1_scores", "test", captions("test"), 25.0, attribute_accuracy=90.0)
    scored(folder / "stage1_scores", "heldout", captions("heldout"), 25.0, attribute_accuracy=80.0)
    scored(folder / "stage1_scores", f"test{report.SHUFFLED}", captions("test"), attribute_accuracy=26.0)
    (folder / "stage1").mkdir()
    log = [{"train_step": 1, "train_loss": 3.5}, {"train_step": 9, "train_loss": 1.5}]
    (folder / "stage1" / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def test_stage_1_scores_come_from_the_runs_and_the_page_is_complete(demo: Path) -> None:
    found = report.write_report(demo, demo.parent / "world")
    expected = {"accuracy": 0.9, "heldout": 0.8, "shuffled": 0.26, "text_prior": 0.25}
    assert found["stage1"] == {modality: pytest.approx(expected) for modality in FACTS}
    assert json.loads((demo / "report.json").read_text())["stage1"]["audio"]["shuffled"] == pytest.approx(0.26)
    page = (demo / "report.html").read_text()
    assert "from 3.500 to 1.500" in page
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", page)
    assert "a &lt;b&gt;red&lt;/b&gt; thing" in page
    assert "<b>" not in page


def test_joint_scores_are_those_of_the_composing_kinds(demo: Path) -> None:
    for split in ("test", "heldout"):
        scored(demo / "stage2_scores", split, captions(split), exact_match=75.0)
    scored(demo / "joint", "words", joint(*KINDS))
    scored(demo / "joint", "test", joint("name", "compose", "conditional"))
    for withheld, right in (("image_video", KINDS[:2]), ("audio", KINDS[:1]), ("image_video_audio", ())):
        scored(demo / "joint", f"test_withheld_{withheld}", joint(*right))
    found = report.write_report(demo, demo.parent / "world")
    assert found["stage2"]["video"] == {"accuracy": 0.75, "heldout": 0.75}
    means = {name: found["joint"][name] for name in report.JOINT}
    assert means == pytest.approx({"both": 2 / 3, "no_vision": 2 / 3, "no_audio": 1 / 3, "neither": 0.0})
    assert (found["joint"]["by_kind"]["compare"], found["joint"]["text_only"]["compare"]) == (0.0, 1.0)
    assert "joint both" in report.summary(found)


def test_a_missing_run_is_named(demo: Path) -> None:
    (demo / "stage1_scores" / "result" / f"test{report.SHUFFLED}_step0_metrics.json").unlink()
    with pytest.raises(DataError, match=r"result has no test_shuffled_image_video_audio_step\*_metrics.json: run the"):
        report.write_report(demo, demo.parent / "world")
