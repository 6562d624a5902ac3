"""LAVIS's own tasks and data sets score the model as they are, on annotations in LAVIS's layout."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lavis_chatbridge.plugin.launch import Session

COLOURS = [(220, 30, 30), (30, 200, 40), (40, 60, 220)]
RUN = {"evaluate": True, "num_workers": 0, "batch_size_eval": 2, "max_len": 6, "min_len": 1, "num_beams": 2,
       "device": "cpu", "job_id": ""}  # fmt: skip
MODEL = {"arch": "chatbridge", "model_type": "tiny", "checkpoint": None}


@pytest.fixture(scope="module")
def session():
    with Session() as one:
        yield one


@pytest.fixture
def score(tmp_path, session):
    """Write a configuration and evaluate it."""
    for n, colour in enumerate(COLOURS, 1):
        path = tmp_path / f"images/val2014/COCO_val2014_{n:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 56), colour).save(path)

    def scoring(datasets, **run):
        env = {"cache_root": str(tmp_path)}
        content = {"model": MODEL, "datasets": datasets, "env": env, "run": RUN | {"output_dir": str(tmp_path)} | run}
        (tmp_path / "run.yaml").write_text(json.dumps(content))  # JSON is YAML
        return session.run(str(tmp_path / "run.yaml"), [], evaluate=True)

    return scoring


def written(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def test_captioning_on_coco_caption(score, tmp_path):
    rows = [
        {"image": f"val2014/COCO_val2014_{n:012d}.jpg", "image_id": f"coco_{n}", "caption": ["a colour"]}
        for n in (1, 2, 3)
    ]
    file = written(tmp_path, "coco.json", rows)
    splits = {split: {"url": file, "storage": file} for split in ("train", "val", "test")}
    info = {"annotations": splits, "images": {"storage": str(tmp_path / "images")}}
    found = score({"coco_caption": {"build_info": info}}, task="captioning", test_splits=["test"], report_metric=False)
    assert found["test"] == {"agg_metrics": 0.0}
    records = json.loads((tmp_path / "result/test_epoch0.json").read_text())
    assert [record["image_id"] for record in records] == [1, 2, 3]
    assert all(isinstance(record["caption"], str) for record in records)


@pytest.mark.parametrize("method", ["rank", "generate"])
def test_vqa_on_coco_vqa_with_the_official_score(score, tmp_path, method):
    rows = [
        {"image": f"val2014/COCO_val2014_{n:012d}.jpg", "question": "What colour is it?", "question_id": n}
        for n in (1, 2, 3)
    ]
    questions = {"questions": [{"image_id": n, "question": "What colour is it?", "question_id": n} for n in (1, 2, 3)]}
    top = {"info": {}, "task_type": "", "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    answers = [{"answer": "red", "answer_id": i, "answer_confidence": "yes"} for i in range(1, 11)]
    annotations = [
        {"question_id": n, "image_id": n, "answers": answers, "answer_type": "other", "question_type": "what"}
        for n in (1, 2, 3)
    ]
    files = [
        written(tmp_path, "vqa.json", rows),
        written(tmp_path, "answers.json", ["red", "green"] if method == "generate" else ["red"]),
        written(tmp_path, "questions.json", top | questions),
        written(tmp_path, "annotations.json", top | {"annotations": annotations}),
    ]
    splits = {"val": {"url": files, "storage": files}}
    info = {"annotations": splits, "images": {"storage": str(tmp_path / "images")}}
    datasets = {"coco_vqa": {"type": "eval", "build_info": info}}
    found = score(datasets, task="vqa", test_splits=["val"], inference_method=method)
    assert set(found["val"]) == {"agg_metrics", "other"}
    if method == "rank":  # of a single candidate
        assert found["val"]["agg_metrics"] == 100.0
    records = json.loads((tmp_path / "result/val_vqa_result.json").read_text())
    assert [record["question_id"] for record in records] == [1, 2, 3]
