"""The real tiny ChatBridge on a small embedded world, through the configuration, the tasks and the runner."""

from __future__ import annotations

import json

import pytest
import torch
from lavis.common.registry import registry
from runner_parts import in_processes

from lavis_chatbridge.runners import checkpoints, distributed
from lavis_chatbridge.runners.config import load_config
from lavis_chatbridge.runners.snapshot import trained_weights
from lavis_chatbridge.toyworld.build import Sizes, build_world

YAML = """
model: {{arch: chatbridge, model_type: tiny, checkpoint: null}}
datasets:
  chatbridge_world_caption: {{data_root: {world}}}
run:
  task: {task}
  max_iters: 4
  batch_size_train: 2
  batch_size_eval: 4
  accum_grad_iters: 2
  init_lr: 1e-3
  num_workers: 0
  log_every: 1
  output_dir: {output}
  job_id: ""
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world") / "w", Sizes(12, 6, 6, 3, 3, 2), processes=1)


def run(tmp_path, world, *options, task="chatbridge_alignment", evaluate=False):
    path = tmp_path / "run.yaml"
    path.write_text(YAML.format(world=world, output=tmp_path / "out", task=task))
    cfg = load_config(path, [*options, *(["run.evaluate=true"] if evaluate else [])])
    torch.manual_seed(cfg.run.seed)
    setup = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
    datasets = setup.build_datasets(cfg)
    runner_class = registry.get_runner_class(cfg.run.runner)
    runner = runner_class(cfg=cfg, job_id="job", task=setup, model=setup.build_model(cfg), datasets=datasets)
    if evaluate:
        return runner.evaluate()
    runner.train()
    return runner


def test_train_resume_and_score(tmp_path, world):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = run(tmp_path / "whole", world, "run.valid_splits=[test]")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "out" / "log.txt").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
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
        assert 0 < score["text_prior"] < 1
    records = json.loads((tmp_path / "whole" / "out" / "result" / "test_step0.json").read_text())
    assert len(records) == 9


@pytest.mark.parametrize("media", ["shuffled", "withheld"])
def test_the_ablation_runs(tmp_path, world, media):
    options = ("run.test_splits=[test]", "run.max_len=2", f"run.media={media}")
    scores = run(tmp_path, world, *options, task="chatbridge_captioning", evaluate=True)
    assert scores["test"]["by_source"]["chatbridge_world_caption/audio"]["samples"] == 3


def _on_a_rank(rank, folder, world, options):
    runner = run(folder, world, "run.batch_size_train=1", *options)
    torch.save(trained_weights(runner.model), folder / f"weights{rank}.pt")
    distributed.close()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path, world, parallel):
    """Also where every process holds only a part of the frozen encoders and of the language model."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    dropless = ("model.perceiver.dropout=0", "run.max_iters=2", "run.valid_splits=[test]")
    one = run(tmp_path / "one", world, *dropless)
    in_processes(_on_a_rank, 2, tmp_path / "two", world, (*dropless, f"run.parallel={parallel}"))
    first, second = (torch.load(tmp_path / "two" / f"weights{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in trained_weights(one.model))
    logs = [(tmp_path / name / "out" / "log.txt").read_text().splitlines() for name in ("one", "two")]
    for key in ("train_loss", "val_loss"):
        found = [[line[key] for line in map(json.loads, log) if key in line] for log in logs]
        assert found[0] == pytest.approx(found[1], abs=1e-4)
