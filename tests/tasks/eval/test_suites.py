"""All fifteen suites end to end with the shipped tiny parts, one process, one model; their prompts; their faults.

The snapshot of prompts changes only on purpose: run with ``UPDATE_SNAPSHOTS=1`` and read the difference.
"""

import json
import os
import re
from pathlib import Path

import pytest

from lavis_chatbridge.cli import main
from lavis_chatbridge.config import PROJECTS
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.plugin import evaluate
from tests.tasks.eval import layouts

SNAPSHOT = Path(__file__).with_name("prompts_snapshot.json")
NAMES = [
    "vqav2", "okvqa", "gqa", "flickr30k", "nocaps", "coco_caption", "msrvtt_qa", "msrvtt_caption", "msvd_qa", "vatex",
    "audiocaps", "clotho", "avsd", "valor", "music_avqa",
]  # fmt: skip
MODERN = ["avqa", "worldsense", "omnibench", "daily_omni", "av_odyssey", "avhbench", "mmau", "video_mme",
          "charades_ego", "mosi", "mosei"]  # fmt: skip
PUBLISHED = {"okvqa": 45.2, "gqa": 41.8, "avsd": 75.4, "valor": 24.7, "flickr30k": 82.5, "nocaps": 115.7,
             "msvd_qa": 45.3, "vatex": 48.9, "clotho": 26.2, "music_avqa": 43.0}  # fmt: skip
"""The paper's zero-shot scores."""

SHORT = ["run.num_workers=0", "run.max_len=6", "run.min_len=1", "run.device=cpu", "model.checkpoint=null"]
"""Overrides that make a run of the tiny model quick; its bridge is then random."""


@pytest.fixture(scope="module")
def benchmark_data(tmp_path_factory) -> Path:
    """A data root with three samples of every benchmark."""
    return layouts.build(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def scored(benchmark_data, tmp_path_factory):
    """``chatbridge evaluate --suite all`` on the benchmarks' data: exit status, table, folder of the runs."""
    folder = tmp_path_factory.mktemp("scored")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    options = [*SHORT, f"env.data_root={benchmark_data}"]
    status = main(["evaluate", "--suite", "all", "--options", *options])
    patch.undo()
    table = json.loads((folder / "output/eval/tiny/scores.json").read_text())
    return status, {line["suite"]: line for line in table["suites"]}, folder / "output/eval/tiny"


def lines_of(folder, name):
    return [json.loads(line) for line in (folder / name / "result/test_step0.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [*NAMES, *MODERN])
def test_a_suite_runs_end_to_end(scored, name):
    status, lines, folder = scored
    assert status == 0
    assert set(lines) == {*NAMES, *MODERN}
    line = lines[name]
    assert (line["status"], line["samples"], line["paper"]) == ("scored", 3, PUBLISHED.get(name))
    assert 0.0 <= line["score"] <= 1000.0
    records = lines_of(folder, name)
    assert [record["index"] for record in records] == [0, 1, 2]
    assert all(record["prompt"].endswith("###Assistant:") and record["references"] for record in records)
    metrics = json.loads((folder / name / "result/test_step0_metrics.json").read_text())
    assert metrics["decoding"]["num_beams"] == (5 if name in NAMES or name == "charades_ego" else 1)
    assert metrics["versions"]["pycocoevalcap"]
    assert metrics["not_predicted"] == 0
    [data] = metrics["data"].values()
    assert (data["samples"], len(data["sha256"])) == (3, 64)


def test_scores_of_captions_say_what_is_missing_without_java(scored):
    _, lines, folder = scored
    line = lines["clotho"]
    assert line["metric"] == "CIDEr"
    assert set(line["scores"]) == {"CIDEr", "ROUGE_L", "BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4"}
    remarks = " ".join(line["remarks"])
    assert "METEOR: Java is not installed" in remarks
    assert "not comparable" in remarks
    assert "26.2" in (folder / "scores.txt").read_text()
    assert "<td>clotho</td>" in (folder / "scores.html").read_text()


def test_multiple_choice_reports_chance_and_records_every_order_of_options(scored):
    _, lines, folder = scored
    assert (lines["mmau"]["chance"], lines["avqa"]["chance"], lines["avhbench"]["chance"]) == (50.0, 100 / 3, 50.0)
    [first, *_] = lines_of(folder, "av_odyssey")
    assert len(first["replies"]) == len(first["chosen"]) == 4
    assert re.findall(r"\[audio (\d)\]", first["prompt"]) == ["0", "1"]
    assert [Path(path).name for modality, path in first["media"] if modality == "audio"] == ["0.wav", "1.wav"]
    assert first["meta"]["options"][:2] == ["(audio 1)", "(audio 2)"]
    assert set(lines["avhbench"]["scores"]) == {"yes_no", "precision", "recall", "F1", "yes_share"}
    assert set(lines["video_mme"]["by_type"]) == {"duration", "domain", "task type"}


def test_rescoring_gives_the_same_scores_without_a_model(scored, capsys):
    _, lines, folder = scored
    for name in ("vqav2", "audiocaps"):
        file = folder / name / "result/test_step0.jsonl"
        assert main(["evaluate", "--rescore", str(file)]) == 0
        found = json.loads(file.with_name("test_step0_rescored.json").read_text())
        assert found["by_source"][f"eval_{name}"]["scores"] == lines[name]["scores"]
    assert "audiocaps" in capsys.readouterr().out


def test_prompts_are_pinned(scored):
    _, _, folder = scored
    found = {name: lines_of(folder, name)[0]["prompt"] for name in [*NAMES, *MODERN]}
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert found == json.loads(SNAPSHOT.read_text())


def test_missing_data_are_listed_and_the_rest_runs(benchmark_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "suites"
    folder.mkdir()
    for name in ("gqa", "valor"):
        text = (PROJECTS / f"eval/{name}.yaml").read_text()
        absent = text.replace("  eval_valor:\n", "  eval_valor:\n    splits: {test: no.json}\n")
        (folder / f"{name}.yaml").write_text(absent)
    options = [*SHORT, f"env.data_root={benchmark_data}", "run.test_splits=[test]"]
    arguments = ["evaluate", "--suite", "zero-shot", "--suite-folder", str(folder), "--ablate"]
    assert main([*arguments, "--options", *options]) == 0
    lines = json.loads((tmp_path / "output/eval/tiny/scores.json").read_text())["suites"]
    assert [(line["suite"], line["media"], line["status"]) for line in lines] == [
        ("gqa", "", "scored"),
        ("gqa", "image withheld", "scored"),
        ("gqa", "image shuffled", "scored"),
        ("valor", "", "missing"),
    ]
    assert lines[1]["drop"] == lines[0]["score"] - lines[1]["score"]
    assert "no.json" in lines[3]["remarks"][0]
    assert "no.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "suites"),
    [
        ("all", {*NAMES, *MODERN}), ("zero-shot", {*PUBLISHED, *MODERN}), ("paper", set(NAMES)),
        ("audio", {"audiocaps", "clotho", "mmau"}), ("image,video", set(NAMES[:10])),
        ("clotho, gqa", {"clotho", "gqa"}),
    ],
)  # fmt: skip
def test_suites_are_chosen_by_name(named, suites):
    assert set(evaluate.choose(named)) == suites


def test_an_unknown_suite_and_a_folder_without_suites_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown suite 'clothoo' in --suite-folder, did you mean 'clotho'"):
        evaluate.choose("clothoo")
    (tmp_path / "odd.yaml").write_text("run: 3")
    (tmp_path / "other.yaml").write_text("run: {metrics: []}")
    with pytest.raises(ConfigError, match="has no suite"):
        evaluate.choose("all", tmp_path)


@pytest.mark.parametrize("model_type", ["vicuna7b", "vicuna13b"])
def test_one_override_takes_the_large_models(benchmark_data, model_type):
    from lavis_chatbridge.runners.config import load_config

    options = [f"model.model_type={model_type}", f"env.data_root={benchmark_data}"]
    for name, path in evaluate.choose("all").items():
        cfg = load_config(path, options)
        assert cfg.run.output_dir == f"output/eval/{model_type}/{name}"
        assert cfg.model_cfg.prompt_layout == "original"
        [section] = cfg.datasets_cfg.values()
        assert section.video_processor.eval.encoder.image_size == 224
