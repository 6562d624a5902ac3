"""A training with the language model in fewer bits, through the runner: resumed exactly, refused on other weights."""

from __future__ import annotations

import json

import pytest
import torch

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.runners import checkpoints, snapshot
from lavis_chatbridge.runners.snapshot import trained_weights
from tests.runners.world_runs import run

STEPS = ("run.max_iters=4", "run.save_every_steps=2", "run.keep_last=5", "run.valid_splits=[test]")


@pytest.mark.parametrize(("how", "other"), [("8bit", "4bit"), ("4bit", "8bit")])
def test_training_in_fewer_bits_resumes_exactly_and_on_the_same_weights_only(tmp_path, world, how, other):
    """Validations, which run without gradients, lie between the steps; LoRA's matrices lie beside the codes."""
    adapters = "model.language_model.lora.target_modules=[q_proj,down_proj]"
    options = (*STEPS, f"model.language_model.quantization={how}", adapters, "run.gradient_checkpointing=true")
    whole = run(tmp_path / "kept", world, *options)
    assert not next(whole.model.llama_model.model.layers[0].self_attn.k_proj.parameters()).is_floating_point()
    newest = tmp_path / "kept" / "out" / "checkpoints" / "step_00000004"
    (newest / checkpoints.MANIFEST).unlink()
    resumed = run(tmp_path / "kept", world, *options, "run.resume=auto")
    first, second = trained_weights(whole.model), trained_weights(resumed.model)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].abs().max() > 0 for name in first if ".lora_B." in name)  # they begin at zero
    state = json.loads((newest / checkpoints.STATE).read_text())
    assert state["fingerprints"] == snapshot.fingerprints(resumed.model)
    elsewhere = (*options, f"model.language_model.quantization={other}", f"run.resume={newest}")
    with pytest.raises(CheckpointError, match="trained with other frozen parts: llama_model"):
        run(tmp_path / "refused", world, *elsewhere)
