"""The real tiny ChatBridge on a small embedded world: trained, resumed, sharded, with adapters, in fewer bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from safetensors.torch import load_file
from torch import nn

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners import distributed
from lavis_chatbridge.runners.checkpoints import MODEL, STATE
from lavis_chatbridge.runners.config import load_config
from tests.runners.runner_parts import YAML, in_processes, logged, same, weights


def run(folder: Path, world: Path, *options: str, task: str = "chatbridge_alignment", evaluate: bool = False) -> Any:
    """Train into ``folder/out``, and return the runner; or evaluate, and return the scores."""
    folder.mkdir(exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(YAML.format(world=world, output=folder / "out", task=task))
    cfg = load_config(path, [*options, f"run.evaluate={str(evaluate).lower()}"])
    torch.manual_seed(cfg.run.seed)
    setup = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
    datasets = setup.build_datasets(cfg)
    runner_class = registry.get_runner_class(cfg.run.runner)
    runner = runner_class(cfg=cfg, job_id="job", task=setup, model=setup.build_model(cfg), datasets=datasets)
    if evaluate:
        return runner.evaluate()
    runner.train()
    return runner


LORA = (
    "model.language_model.lora.rank=4",
    "model.language_model.lora.dropout=0.1",
    "model.language_model.lora.target_modules=[q_proj,up_proj]",
)
SAVED = ("run.save_every_steps=2", "run.keep_last=5")


def resumed_from_step_2(folder: Path, world: Path, *options: str) -> Any:
    """The run of ``folder`` without its last checkpoint, resumed in a copy."""
    cut = folder.with_name("cut")
    shutil.copytree(folder, cut)
    shutil.rmtree(cut / "out" / "checkpoints" / "step_00000004")
    return run(cut, world, *options, "run.resume=auto")


def test_train_resume_and_score(tmp_path, world):
    whole = run(tmp_path / "whole", world, *SAVED, "run.valid_splits=[test]")
    losses = logged(tmp_path / "whole" / "out", "train_loss")
    assert len(losses) == 4
    assert all(0 < loss < 10 for loss in losses)
    newest = tmp_path / "whole/out/checkpoints/step_00000004"
    state = json.loads((newest / STATE).read_text())
    assert {"visual_encoder", "audio_encoder", "llama_model", "tokenizer"} <= set(state["frozen"])
    assert state["adapters"] is None
    names = set(load_file(newest / MODEL))
    assert {"image_query_tokens", "audio_query_tokens", "llama_proj.weight", "audio_trans.weight"} <= names
    assert not any(name.startswith(("llama_model", "visual_encoder", "audio_encoder")) for name in names)
    resumed = resumed_from_step_2(tmp_path / "whole", world, *SAVED, "run.valid_splits=[test]")
    assert same(weights(whole), weights(resumed))

    trained = tmp_path / "whole" / "out" / "model.safetensors"
    options = (f"model.checkpoint={trained}", "run.test_splits=[test,heldout]", "run.max_len=4")
    scores = run(tmp_path / "whole", world, *options, task="chatbridge_captioning", evaluate=True)
    assert set(scores) == {"test", "heldout"}
    modalities = ("image", "video", "audio")
    assert set(scores["test"]["by_source"]) == {f"chatbridge_world_caption/{modality}" for modality in modalities}
    assert all(score["samples"] == 3 for score in scores["test"]["by_source"].values())


def test_audio_alone_is_added_to_a_vision_bridge(tmp_path, world):
    run(tmp_path / "vision", world, "run.train=[perceiver,projection,vision_queries]", "run.max_iters=2")
    first = load_file(tmp_path / "vision" / "out" / "model.safetensors")
    start = f"model.checkpoint={tmp_path / 'vision' / 'out' / 'model.safetensors'}"
    one = run(tmp_path / "audio", world, start, "run.train=[audio_queries,audio_trans]")
    trained = {"audio_query_tokens", "audio_trans.weight", "audio_trans.bias"}
    assert {name for name, p in one.model.named_parameters() if p.requires_grad} == trained
    second = load_file(tmp_path / "audio" / "out" / "model.safetensors")
    assert first.keys() == second.keys()
    assert {name for name in first if not torch.equal(first[name], second[name])} == trained


EXACT = ("model.perceiver.dropout=0", "run.max_iters=2", "run.valid_splits=[test]")
EXACT += ("model.language_model.lora.rank=4", "model.language_model.lora.dropout=0")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, world):
    """The folder of a training by one process, and its weights."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, weights(run(folder, world, *EXACT, "run.gradient_checkpointing=true"))


def _on_a_rank(rank: int, folder: Path, world: Path, parallel: str) -> None:
    trained = run(folder, world, *EXACT, "run.batch_size_train=1", f"run.parallel={parallel}")
    torch.save(weights(trained), folder / f"weights{rank}.pt")
    distributed.close()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path, world, alone, parallel):
    """Also where every process has only a part of the language model, and adapters beside it."""
    folder, expected = alone
    in_processes(_on_a_rank, 2, tmp_path, world, parallel)
    first, second = (torch.load(tmp_path / f"weights{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first, second)
    for name, tensor in expected.items():
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-3, msg=name)
    for key in ("train_loss", "val_loss"):
        assert logged(folder / "out", key) == pytest.approx(logged(tmp_path / "out", key), abs=1e-4)


def test_adapters_with_features_sorted_batches_and_compilation_resume_exactly(tmp_path, world, monkeypatch):
    compile_module = nn.Module.compile  # with a backend that needs no compiler
    monkeypatch.setattr(nn.Module, "compile", lambda module, *_, **__: compile_module(module, backend="eager"))
    options = (*LORA, *SAVED, "run.compile=true", "run.group_by_length=true")
    options += (f"run.feature_cache={tmp_path / 'features'}",)
    whole = run(tmp_path / "whole", world, *options)
    torch.compiler.reset()
    resumed = resumed_from_step_2(tmp_path / "whole", world, *options)
    assert same(weights(whole), weights(resumed))
    assert logged(tmp_path / "cut/out", "train_loss") == logged(tmp_path / "whole/out", "train_loss")
    assert all(block._compiled_call_impl is not None for block in resumed.model.llama_model.model.layers)
    ups = [tensor for name, tensor in weights(whole).items() if ".lora_B." in name]
    assert len(ups) == 2 * whole.model.llama_model.config.num_hidden_layers
    assert all(tensor.abs().max() > 0 for tensor in ups)  # they start at zero

    out, other = tmp_path / "whole" / "out", (*LORA, "model.language_model.lora.alpha=8")
    for start in (f"model.checkpoint={out / MODEL}", f"run.resume={out / 'checkpoints/step_00000004'}"):
        with pytest.raises(CheckpointError, match=r"alpha 16 on .*, the model's: rank 4, alpha 8"):
            run(tmp_path / "refused", world, *other, start)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_training_resumes_exactly(tmp_path, world, bits):
    """Validations, which run without gradients, are between the steps; LoRA's matrices are beside the codes."""
    adapters = "model.language_model.lora.target_modules=[q_proj,down_proj]"
    quantised = (*SAVED, "run.valid_splits=[test]", adapters, "run.gradient_checkpointing=true")
    quantised += (f"model.language_model.quantization={bits}",)
    whole = run(tmp_path / "whole", world, *quantised)
    assert not next(whole.model.llama_model.model.layers[0].self_attn.k_proj.parameters()).is_floating_point()
    resumed = resumed_from_step_2(tmp_path / "whole", world, *quantised)
    assert same(weights(whole), weights(resumed))
    assert all(tensor.abs().max() > 0 for name, tensor in weights(whole).items() if lora.is_adapter(name))
