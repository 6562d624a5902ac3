"""The words behind ``--ablate``, and which of them suit the data."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lavis_chatbridge import cli
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.plugin import ablation
from lavis_chatbridge.plugin.ablation import Condition
from lavis_chatbridge.plugin.suite_table import Line
from lavis_chatbridge.prompting import Message
from lavis_chatbridge.schema import Medium, Sample, write_jsonl

CONFIG = """
model: {arch: chatbridge, model_type: tiny}
datasets: {%s: {}}
run: {task: chatbridge_captioning}
"""


def configuration(root, **kinds_of):
    """Of a JSONL data set whose splits have these kinds of media, as it is after a run."""
    for split, kinds in kinds_of.items():
        turns = (Message("user", "What?", tuple(kinds)), Message("assistant", "this"))
        media = tuple(Medium(kind, str(root / "x")) for kind in kinds)
        write_jsonl(root / f"{split}.jsonl", [Sample("s", media, turns=turns)])
    section = {"data_root": str(root), "splits": {split: f"{split}.jsonl" for split in kinds_of}, "templates": False}
    run = SimpleNamespace(test_splits=list(kinds_of))
    return SimpleNamespace(run=run, datasets_cfg={"chatbridge_jsonl": section})


def test_words_are_conditions():
    words = ["withheld", "shuffled:audio", "withheld:audio,image", "shuffled:audio"]
    assert ablation.parse(words) == [
        Condition("withheld", ("image", "video", "audio")),
        Condition("shuffled", ("audio",)),
        Condition("withheld", ("image", "audio")),
    ]
    both = ablation.parse(words)[2]
    assert both.label == "image and audio withheld"
    assert both.options == {"run.media": "withheld", "run.media_kinds": "[image,audio]"}


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("hidden", "'hidden' is neither withheld nor shuffled"),
        ("normal:image", "'normal' is neither withheld nor shuffled"),
        ("withheld:sound", "unknown kind 'sound'"),
        ("withheld:", "unknown kind ''"),
        ("", "'' is neither withheld nor shuffled"),
    ],
)
def test_other_words_are_refused(word, why, capsys):
    with pytest.raises(ConfigError, match=why):
        ablation.parse([word])
    assert cli.main(["evaluate", "--suite", "gqa", "--ablate", word]) == 2
    assert f"{why}; write MODE or MODE:KIND,KIND with the kinds image, video, audio" in capsys.readouterr().err


def test_conditions_suit_the_data(tmp_path):
    cfg = configuration(tmp_path, seen=["image"], both=["video", "audio"], words=[])
    every = ablation.conditions([], cfg)
    assert [condition.label for condition in every] == [
        f"{kind} {mode}" for kind in ("image", "video", "audio") for mode in ("withheld", "shuffled")
    ]
    assert every[0].splits == ("seen",)
    assert every[0].options["run.test_splits"] == "[seen]"  # the others have no picture to lose
    assert every[4] == Condition("withheld", ("audio",), ("both",))
    [one] = ablation.conditions(["withheld"], cfg)
    assert one == Condition("withheld", ("image", "video", "audio"), ("seen", "both"))


def test_media_that_the_data_lack_are_left_out_and_told(tmp_path, caplog):
    cfg = configuration(tmp_path, test=["image"])
    words = ["withheld", "shuffled:audio", "shuffled:image,video", "withheld:image"]
    assert [condition.label for condition in ablation.conditions(words, cfg)] == ["image withheld", "image shuffled"]
    assert "there are no such media in splits test" in caplog.text


def test_media_of_data_sets_of_lavis_cannot_be_exchanged(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG % "coco_caption")
    assert cli.main(["evaluate", "--cfg-path", str(path), "--ablate"]) == 2
    assert "data set 'coco_caption' is LAVIS's own" in capsys.readouterr().err


def test_media_are_not_taken_away_twice(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG % "chatbridge_jsonl")
    assert cli.main(["evaluate", "--cfg-path", str(path), "--ablate", "--options", "run.media=withheld"]) == 2
    assert "--ablate scores with all media first, but run.media is 'withheld'" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "name"), [("task", "vqa"), ("runner", "runner_base")])
def test_what_knows_no_media_to_take_away_is_refused(tmp_path, key, name, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG % "chatbridge_jsonl")
    assert cli.main(["evaluate", "--cfg-path", str(path), "--ablate", "--options", f"run.{key}={name}"]) == 2
    assert f"--ablate: run.{key} '{name}' is LAVIS's own, which knows no run.media" in capsys.readouterr().err


def test_unknown_data_sets_are_named_as_that(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG % "chatbridge_jsonll")
    assert cli.main(["evaluate", "--cfg-path", str(path), "--ablate"]) == 2
    assert "unknown name 'chatbridge_jsonll', did you mean 'chatbridge_jsonl'" in capsys.readouterr().err
    path.write_text("model: {arch: chatbridge}\ndatasets: [chatbridge_jsonl]\nrun: {}\n")
    assert cli.main(["evaluate", "--cfg-path", str(path), "--ablate"]) == 2
    assert "error: datasets: expected a mapping, found ['chatbridge_jsonl']" in capsys.readouterr().err
    path.write_text("datasets: {chatbridge_jsonl: {}}\nrun: {output_dir: '${nowhere}'}\n")
    assert cli.main(["evaluate", "--cfg-path", str(path), "--ablate"]) == 2
    assert "run.yaml: Interpolation key 'nowhere' not found" in capsys.readouterr().err


def test_data_without_media_are_not_passed_over_in_silence(tmp_path, caplog):
    assert ablation.conditions([], configuration(tmp_path, test=[], words=[])) == []
    assert "--ablate: there are no media in splits test, words" in caplog.text


def test_a_condition_that_fails_is_a_line():
    def score(condition):
        if condition.mode == "shuffled":
            raise DataError("too\nfew")
        return [Line("a", score=20.0)]

    found = [Condition("shuffled", ("audio",)), Condition("withheld", ("audio",))]
    failed, other = ablation.scored(found, score, "test", [Line("a", score=80.0)])
    assert (failed.suite, failed.media, failed.status, failed.remarks) == (
        "test",
        "audio shuffled",
        "failed",
        ["too few"],
    )
    assert (other.media, other.drop) == ("audio withheld", 60.0)


def test_predictions_alone_cannot_be_ablated(capsys):
    assert cli.main(["evaluate", "--rescore", "some.json", "--ablate"]) == 2
    assert "--ablate needs a model" in capsys.readouterr().err


def test_a_drop_is_against_the_same_line_with_all_media():
    whole = [Line("a", score=80.0), Line("b", score=None), Line("c", score=50.0)]
    without = [Line("a", score=20.0), Line("b", score=1.0), Line("c", score=60.0)]
    ablation.mark(without, whole, Condition("withheld", ("audio",)))
    assert [line.drop for line in without] == [60.0, None, -10.0]
    assert {line.media for line in without} == {"audio withheld"}
    assert {line.media for line in whole} == {""}
