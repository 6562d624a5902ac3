"""Adapters on the language model through the runner: trained beside the bridge, kept, resumed, spread, refused."""

from __future__ import annotations

import json

import pytest
import torch
from runner_parts import in_processes, runner
from test_end_to_end import run, world  # noqa: F401  (a fixture)

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners import checkpoints, distributed, snapshot
from lavis_chatbridge.runners.snapshot import trained_weights

RANK = "model.language_model.lora.rank=4"
LORA = (RANK, "model.language_model.lora.dropout=0.1", "model.language_model.lora.target_modules=[q_proj,up_proj]")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "out" / "log.txt").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


def test_adapters_train_resume_exactly_and_load_again(tmp_path, world):  # noqa: F811
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
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
    own = losses(tmp_path / "whole")
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
        folder = tmp_path / f"refused{number}"
        folder.mkdir()
        with pytest.raises(CheckpointError, match=message):
            run(folder, world, *options, f"run.resume={newest}")


def run_model(world, tmp_path, *options):  # noqa: F811
    """The model of a configuration alone."""
    from lavis.common.registry import registry
    from test_end_to_end import YAML

    from lavis_chatbridge.runners.config import load_config

    path = tmp_path / "model.yaml"
    path.write_text(YAML.format(world=world, output=tmp_path / "out", task="chatbridge_alignment"))
    cfg = load_config(path, list(options))
    return registry.get_model_class("chatbridge").from_config(cfg.model_cfg)


def _on_a_rank(rank, folder, world, options):  # noqa: F811
    one = run(folder, world, "run.batch_size_train=1", *options)
    torch.save(trained_weights(one.model), folder / f"weights{rank}.pt")
    distributed.close()


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_the_adapters_of_one(tmp_path, world, way):  # noqa: F811
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    options = (*LORA, "model.language_model.lora.dropout=0", "run.max_iters=2")
    one = run(tmp_path / "one", world, *options, "run.gradient_checkpointing=true")
    in_processes(_on_a_rank, 2, tmp_path / "two", world, (*options, f"run.parallel={way}"))
    first, second = (torch.load(tmp_path / "two" / f"weights{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, tensor in trained_weights(one.model).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-4, msg=name)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_a_model_without_adapters_says_nothing_of_them(tmp_path):
    one = runner(tmp_path, max_iters=1)
    one.train()
    assert lora.describe(one.model) is None
    state = json.loads((tmp_path / "checkpoints" / "step_00000001" / checkpoints.STATE).read_text())
    assert state["adapters"] is None
