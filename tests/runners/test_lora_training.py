"""Adapters on the language model through the runner: trained beside the bridge, kept, resumed, spread, refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from lavis.common.registry import registry
from torch import nn

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners import checkpoints, snapshot
from lavis_chatbridge.runners.snapshot import trained_weights
from tests.runners.runner_parts import runner
from tests.runners.world_runs import configured, equal_on_two_processes, logged, run

RANK = "model.language_model.lora.rank=4"
LORA = (RANK, "model.language_model.lora.dropout=0.1", "model.language_model.lora.target_modules=[q_proj,up_proj]")


def test_adapters_train_resume_exactly_and_load_again(tmp_path, world):
    steps = ("run.max_iters=6", "run.save_every_steps=3", "run.keep_last=5")
    whole = run(tmp_path / "whole", world, *LORA, *steps)
    fresh = run(tmp_path / "cut", world, *LORA, *steps)
    (tmp_path / "cut" / "out" / "checkpoints" / "step_00000006" / checkpoints.MANIFEST).unlink()
    resumed = run(tmp_path / "cut", world, *LORA, *steps, "run.resume=auto")
    first, second = trained_weights(whole.model), trained_weights(resumed.model)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ups = [name for name in first if ".lora_B." in name]
    assert len(ups) == 2 * whole.model.llama_model.config.num_hidden_layers
    assert all(first[name].abs().max() > 0 for name in ups)  # they begin at zero
    assert not [name for name in first if name.startswith("llama_model") and not lora.is_adapter(name)]
    assert snapshot.fingerprints(whole.model) == snapshot.fingerprints(fresh.model)
    own = logged(tmp_path / "whole", "train_loss")
    assert sum(own[-2:]) < sum(own[:2])

    path = tmp_path / "whole" / "out" / "model.safetensors"
    again = run_model(world, tmp_path, *LORA, f"model.checkpoint={path}")
    assert all(torch.equal(tensor, trained_weights(again)[name]) for name, tensor in first.items())
    embeds = torch.randn(1, 5, again.llama_proj.out_features)
    with torch.no_grad():
        one, two = (model.eval().llama_model(inputs_embeds=embeds).logits for model in (whole.model, again))
    assert torch.equal(one, two)

    newest = tmp_path / "whole" / "out" / "checkpoints" / "step_00000006"
    refusals = {
        (): "it has LoRA adapters of rank 4, alpha 16 on q_proj, up_proj, but the model has none",
        (*LORA, "model.language_model.lora.rank=2"): "of rank 4, .* the model's of rank 2, alpha 16",
        (*LORA, "model.language_model.lora.alpha=8"): "alpha 16 on .*, the model's of rank 4, alpha 8",
    }
    for number, (options, message) in enumerate(refusals.items()):
        with pytest.raises(CheckpointError, match=message):
            run_model(world, tmp_path, *options, f"model.checkpoint={path}")
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path / f"refused{number}", world, *options, f"run.resume={newest}")


def test_compiled_adapters_with_features_and_sorted_batches_go_on_exactly(tmp_path, world, monkeypatch):
    compiled = nn.Module.compile  # a backend that needs no compiler; the default one gave equal numbers too
    monkeypatch.setattr(nn.Module, "compile", lambda module, *_, **__: compiled(module, backend="eager"))
    options = (*LORA, "run.compile=true", "run.group_by_length=true", f"run.feature_cache={tmp_path / 'features'}")
    options += ("run.save_every_steps=2", "run.keep_last=5")  # of two micro-batches each, see `world_runs`
    whole = run(tmp_path / "whole", world, *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "out" / "checkpoints" / "step_00000004")
    torch.compiler.reset()
    resumed = run(tmp_path / "cut", world, *options, "run.resume=auto")
    first, second = trained_weights(whole.model), trained_weights(resumed.model)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert all(block._compiled_call_impl is not None for block in resumed.model.llama_model.model.layers)
    assert logged(tmp_path / "cut", "train_loss") == logged(tmp_path / "whole", "train_loss")
    assert len(logged(tmp_path / "cut", "train_loss")) == 4


def run_model(world, folder, *options):
    """The model of a configuration alone."""
    return registry.get_model_class("chatbridge").from_config(configured(folder, world, *options).model_cfg)


TWO_STEPS = (*LORA, "model.language_model.lora.dropout=0", "run.max_iters=2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, world):
    """The folder of a training by one process, and its weights."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained_weights(run(folder, world, *TWO_STEPS, "run.gradient_checkpointing=true").model)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_the_adapters_of_one(tmp_path, world, alone, way):
    folder, weights = alone
    equal_on_two_processes(tmp_path, world, (*TWO_STEPS, f"run.parallel={way}"), weights, atol=1e-4)
    assert logged(tmp_path, "train_loss") == pytest.approx(logged(folder, "train_loss"), abs=1e-4)


def test_a_model_without_adapters_says_nothing_of_them(tmp_path):
    one = runner(tmp_path, max_iters=1)
    one.train()
    assert lora.describe(one.model) is None
    state = json.loads((tmp_path / "checkpoints" / "step_00000001" / checkpoints.STATE).read_text())
    assert state["adapters"] is None
