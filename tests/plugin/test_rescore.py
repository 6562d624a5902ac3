"""Predictions that are scored again: files of any content, and what they lack."""

from __future__ import annotations

import json

import pytest

from lavis_chatbridge import cli

AGAIN = ("--options", "run.metrics=[exact_match]")


def record(number, **change):
    answers = {"answers": ["red"], "references": []}
    return {"source": "a", "index": number, "sample_id": f"s{number}", "prediction": "red", **answers, **change}


def rescored(path, *words):
    return cli.main(["evaluate", "--rescore", str(path), *words])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (json.dumps([record(0), record(1)])[:90], "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "expected a list of predictions"),
        ("[]", "expected a list of predictions"),
        ("[1]", "expected a list of predictions"),
        ('[{"image_id": 1, "caption": "a"}]', "nothing could be scored. prediction 0 has no sample_id"),
        (json.dumps([record(0), record(0)]), "sample 's0' was predicted twice"),
        (json.dumps([record(0, prediction=None)]), "prediction 0 is None, expected text"),
        (json.dumps([record(0, answers=[])]), "none of 1 predictions has references or answers"),
    ],
)
def test_what_is_no_file_of_predictions_is_named(tmp_path, capsys, content, why):
    path = tmp_path / "test_step0.json"
    path.write_text(content)
    assert rescored(path, *AGAIN) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "test_step0_rescored.json").exists()


def test_a_source_without_answers_does_not_take_the_scores_of_the_others(tmp_path, capsys):
    path = tmp_path / "test_step0.json"
    odd = record(1, source="b", answers=[], meta=["no mapping"])
    path.write_text(json.dumps([record(0, meta={"type": 7}), odd]))
    assert rescored(path, *AGAIN) == 1
    assert "b: none of 1 predictions has references" in capsys.readouterr().out
    found = json.loads((tmp_path / "test_step0_rescored.json").read_text())["by_source"]
    assert found["a"]["by_type"] == {"exact_match": {"7": 100.0}}
    assert "fault" in found["b"]


def test_the_figure_of_the_paper_stands_beside_whole_media_only(tmp_path, capsys):
    path = tmp_path / "test_step0.json"
    path.write_text(json.dumps([record(0)]))
    said = {"metrics": ["exact_match"], "published": {"exact_match": 45.2}}
    (tmp_path / "test_step0_metrics.json").write_text(json.dumps(said))
    assert rescored(path) == 0
    assert "45.2" in capsys.readouterr().out
    (tmp_path / "test_step0_metrics.json").write_text(
        json.dumps({**said, "media": "withheld", "media_kinds": ["audio"]})
    )
    assert rescored(path) == 0
    out = capsys.readouterr().out
    assert "audio withheld" in out
    assert "45.2" not in out


def test_a_damaged_file_of_scores_leaves_the_choice_to_the_options(tmp_path, caplog, capsys):
    path = tmp_path / "test_step0.json"
    path.write_text(json.dumps([record(0)]))
    (tmp_path / "test_step0_metrics.json").write_text('{"metrics": ')
    assert rescored(path) == 2
    assert "name them, such as --options run.metrics=[exact_match]" in capsys.readouterr().err
    assert rescored(path, *AGAIN) == 0
    assert "test_step0_metrics.json is damaged" in caplog.text


def test_a_folder_that_takes_nothing_is_named(tmp_path, capsys):
    path = tmp_path / "test_step0.json"
    path.write_text(json.dumps([record(0)]))
    (tmp_path / "test_step0_rescored.json").mkdir()
    assert rescored(path, *AGAIN) == 2
    assert "test_step0_rescored.json: cannot be written: Is a directory" in capsys.readouterr().err
