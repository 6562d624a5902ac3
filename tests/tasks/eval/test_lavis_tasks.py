"""LAVIS's own tasks and data sets score the model as they are, on annotations in LAVIS's layout."""

import json

import pytest
from lavis.common.vqa_tools.vqa_eval import VQAEval
from PIL import Image

from tests.media.making import video_file

COLOURS = [(220, 30, 30), (30, 200, 40), (40, 60, 220)]
RUN = {"evaluate": True, "num_workers": 0, "batch_size_eval": 2, "max_len": 6, "min_len": 1, "num_beams": 2,
       "device": "cpu", "job_id": ""}  # fmt: skip
MODEL = {"arch": "chatbridge", "model_type": "tiny", "checkpoint": None}
VIDEO_PROCESSORS = {split: {"name": f"chatbridge_video_{split}", "num_frames": 4} for split in ("train", "eval")}


@pytest.fixture
def score(tmp_path, runs):
    """Write a configuration and evaluate it."""
    for n, colour in enumerate(COLOURS, 1):
        path = tmp_path / f"images/val2014/COCO_val2014_{n:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 56), colour).save(path)

    def scoring(datasets, **run):
        env = {"cache_root": str(tmp_path)}
        content = {"model": MODEL, "datasets": datasets, "env": env, "run": RUN | {"output_dir": str(tmp_path)} | run}
        (tmp_path / "run.yaml").write_text(json.dumps(content))  # JSON is YAML
        return runs.run(str(tmp_path / "run.yaml"), [], evaluate=True)

    return scoring


def written(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def results(folder, name):
    """What LAVIS's task has written."""
    return json.loads((folder / f"result/{name}.json").read_text())


def rows_of(**columns):
    """A row about each picture; a column is a value or a function of the picture's number."""
    return [
        {"image": f"val2014/COCO_val2014_{n:012d}.jpg"}
        | {name: value(n) if callable(value) else value for name, value in columns.items()}
        for n in (1, 2, 3)
    ]


def official_files(folder, candidates):
    """The four files of a split in LAVIS's layout of VQAv2: rows, candidates, the official questions and answers."""
    rows = rows_of(question="What colour is it?", question_id=int)
    questions = {"questions": [{"image_id": n, "question": "What colour is it?", "question_id": n} for n in (1, 2, 3)]}
    top = {"info": {}, "task_type": "", "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    answers = [{"answer": "red", "answer_id": i, "answer_confidence": "yes"} for i in range(1, 11)]
    annotations = [
        {"question_id": n, "image_id": n, "answers": answers, "answer_type": "other", "question_type": "what"}
        for n in (1, 2, 3)
    ]
    return [
        written(folder, "vqa.json", rows),
        written(folder, "answers.json", candidates),
        written(folder, "questions.json", top | questions),
        written(folder, "annotations.json", top | {"annotations": annotations}),
    ]


def section(folder, splits, media="images", **more):
    """A data set's section whose annotations are files that exist."""
    annotations = {split: {"url": files, "storage": files} for split, files in splits.items()}
    return more | {"build_info": {"annotations": annotations, media: {"storage": str(folder / media)}}}


@pytest.mark.parametrize("method", ["rank", "generate"])
def test_vqa_on_coco_vqa_with_the_official_score(score, tmp_path, method):
    files = official_files(tmp_path, ["red", "green"] if method == "generate" else ["red"])
    datasets = {"coco_vqa": section(tmp_path, {"val": files}, type="eval")}
    found = score(datasets, task="vqa", test_splits=["val"], inference_method=method)
    assert set(found["val"]) == {"agg_metrics", "other"}
    if method == "rank":  # of a single candidate
        assert found["val"]["agg_metrics"] == 100.0
    records = results(tmp_path, "val_vqa_result")
    assert [record["question_id"] for record in records] == [1, 2, 3]


def test_gqa_on_gqa_counts_generated_answers(score, tmp_path):
    def run(name, answers):
        columns = {"question": "Is it red?", "question_id": int, "answer": lambda n: answers[n - 1]}
        rows = written(tmp_path, name, rows_of(**columns))
        datasets = {"gqa": section(tmp_path, {"train": [rows], "val": [rows], "test": [rows]}, type="balanced_testdev")}
        return score(datasets, task="gqa", test_splits=["val"], inference_method="generate")["val"]

    assert run("other.json", ["no such answer"] * 3) == {"agg_metrics": 0.0, "acc": 0.0}
    records, official = results(tmp_path, "val_vqa_result"), VQAEval()
    said = [official.processDigitArticle(official.processPunctuation(record["pred_ans"])) for record in records]
    assert run("same.json", [*said[:2], "no such answer"])["acc"] == pytest.approx(200 / 3)


def video_rows(folder, **keys):
    (folder / "videos").mkdir()
    for n in (1, 2):
        (folder / f"videos/video{n}.mp4").write_bytes(video_file(6 + n))
    return [{"video": f"video{n}.mp4"} | {key: value or n for key, value in keys.items()} for n in (1, 2)]


def test_vqa_on_questions_about_videos_writes_answers(score, tmp_path):
    rows = video_rows(tmp_path, question="Who runs?", question_id=None, answer="man")
    file, labels = written(tmp_path, "qa.json", rows), written(tmp_path, "labels.json", {"man": 0})
    splits = {"train": file, "val": file, "test": file, "ans2label": labels}
    datasets = {"msvd_qa": section(tmp_path, splits, "videos", vis_processor=VIDEO_PROCESSORS)}
    found = score(datasets, task="vqa", test_splits=["test"], inference_method="generate")
    assert found == {"test": {}}  # LAVIS counts no answers in words
    assert [(r["question_id"], type(r["answer"])) for r in results(tmp_path, "test_vqa_result")] == [(1, str), (2, str)]


@pytest.mark.parametrize("name", ["coco_caption", "msvd_caption"])
def test_captioning(score, tmp_path, name):
    """LAVIS's defaults for video captions have another name (`msvd_cap`)."""
    if name == "coco_caption":
        rows, media, more = rows_of(image_id="coco_{}".format, caption=["a colour"]), "images", {}
    else:
        rows, media = video_rows(tmp_path, image_id=None, instance_id=None, caption="a man"), "videos"
        more = {"vis_processor": VIDEO_PROCESSORS}
    splits = dict.fromkeys(("train", "val", "test"), written(tmp_path, "cap.json", rows))
    datasets = {name: section(tmp_path, splits, media, **more)}
    found = score(datasets, task="captioning", test_splits=["test"], report_metric=False)
    assert found == {"test": {"agg_metrics": 0.0}}
    records = results(tmp_path, "test_epoch0")
    assert [record["image_id"] for record in records] == list(range(1, len(rows) + 1))
    assert all(isinstance(record["caption"], str) for record in records)


def test_aok_vqa_on_aok_vqa(score, tmp_path):
    answers = {"direct_answers": lambda n: ["red"] * n + ["green"] * (10 - n), "question_id": "q{}".format}
    rows = rows_of(question="What colour is it?", choices=["red", "green"], correct_choice_idx=0, **answers)
    file = written(tmp_path, "aok.json", rows)
    files = [file, written(tmp_path, "answers.json", ["red"])]
    datasets = {"aok_vqa": section(tmp_path, {"train": [file], "val": files, "test": files})}
    found = score(datasets, task="aok_vqa", test_splits=["val"], inference_method="rank")
    assert found["val"] == {"agg_metrics": pytest.approx(200 / 3), "acc": pytest.approx(200 / 3)}  # 1/3, 2/3 and 3/3
    records = results(tmp_path, "val_vqa_result")
    assert [(record["question_id"], record["pred_ans"]) for record in records] == [(f"q{n}", "red") for n in (1, 2, 3)]
