"""The real tiny ChatBridge on a small embedded world, through the configuration, the tasks and the runner."""

from __future__ import annotations

import json

import pytest
import torch

from lavis_chatbridge.runners import checkpoints
from lavis_chatbridge.runners.snapshot import trained_weights
from tests.runners.world_runs import equal_on_two_processes, logged, run


def test_train_resume_and_score(tmp_path, world):
    whole = run(tmp_path / "whole", world, "run.valid_splits=[test]")
    losses = logged(tmp_path / "whole", "train_loss")
    assert len(losses) == 4
    assert all(0 < loss < 10 for loss in losses)
    folder = tmp_path / "whole" / "out" / "checkpoints" / "step_00000004"
    state = json.loads((folder / checkpoints.STATE).read_text())
    assert {"visual_encoder", "audio_encoder", "llama_model", "tokenizer"} <= set(state["fingerprints"])
    names = set(checkpoints.read(folder).model)
    assert {"image_query_tokens", "audio_query_tokens", "llama_proj.weight", "audio_trans.weight"} <= names
    assert not any(name.startswith(("llama_model", "visual_encoder", "audio_encoder")) for name in names)

    run(tmp_path / "cut", world, "run.max_iters=4", "run.save_every_steps=2", "run.keep_last=5")
    (tmp_path / "cut" / "out" / "checkpoints" / "step_00000004" / checkpoints.MANIFEST).unlink()
    resumed = run(tmp_path / "cut", world, "run.resume=auto")
    trained = [name for name, parameter in whole.model.named_parameters() if parameter.requires_grad]
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in trained)

    weights = tmp_path / "whole" / "out" / "model.safetensors"
    options = (f"model.checkpoint={weights}", "run.test_splits=[test,heldout]", "run.max_len=4")
    scores = run(tmp_path / "whole", world, *options, task="chatbridge_captioning", evaluate=True)
    assert set(scores) == {"test", "heldout"}
    assert set(scores["test"]["by_source"]) == {
        f"chatbridge_world_caption/{kind}" for kind in ("image", "video", "audio")
    }
    for score in scores["test"]["by_source"].values():
        assert score["samples"] == 3
        assert 0 < score["chance"] < 100
    lines = (tmp_path / "whole" / "out" / "result" / "test_step0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 9


@pytest.mark.parametrize("media", ["shuffled", "withheld"])
def test_the_ablation_runs(tmp_path, world, media):
    options = ("run.test_splits=[test]", "run.max_len=2", f"run.media={media}")
    scores = run(tmp_path, world, *options, task="chatbridge_captioning", evaluate=True)
    assert scores["test"]["by_source"]["chatbridge_world_caption/audio"]["samples"] == 3


DROPLESS = ("model.perceiver.dropout=0", "run.max_iters=2", "run.valid_splits=[test]")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, world):
    """The folder of a training by one process, and its weights."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained_weights(run(folder, world, *DROPLESS).model)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path, world, alone, parallel):
    """Also where every process holds only a part of the frozen encoders and of the language model."""
    folder, weights = alone
    equal_on_two_processes(tmp_path, world, (*DROPLESS, f"run.parallel={parallel}"), weights, atol=1e-3)
    for key in ("train_loss", "val_loss"):
        assert logged(folder, key) == pytest.approx(logged(tmp_path, key), abs=1e-4)
