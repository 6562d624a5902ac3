"""What makes a step fast is asked for: compiled frozen blocks, a fused AdamW, page-locked memory, fused attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lavis_chatbridge.runners import data, optim, parallel
from lavis_chatbridge.runners.settings import RunSettings
from tests.models.building import small_model

CPU = torch.device("cpu")


def test_compiled_frozen_blocks_change_no_loss_and_no_gradient(
    golden_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(golden_dir / "tokenizer")
    batch = {"image": torch.randn(2, 3, 28, 28), "text_input": ["a red ball", "a dog"]}
    compiled: list[nn.Module] = []
    compile_module = nn.Module.compile

    def with_a_backend_that_needs_no_compiler(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        compiled.append(module)
        compile_module(module, *args, backend="eager", **kwargs)

    monkeypatch.setattr(nn.Module, "compile", with_a_backend_that_needs_no_compiler)
    losses, gradients = [], []
    for chosen in (False, True):
        parallel.prepare(model, RunSettings(task="x", max_iters=1, compile=chosen), CPU)
        model.zero_grad()
        losses.append(model(batch)["loss"])
        losses[-1].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert bool(compiled) is chosen
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)
    blocks = [model.visual_encoder.blocks, model.audio_encoder.encoder.layers, model.llama_model.model.layers]
    assert {id(block) for block in compiled} == {id(block) for stack in blocks for block in stack}
    assert all(block._compiled_call_impl is not None for block in compiled)


class OnCuda(nn.Parameter):
    """A parameter that says that it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize(("kind", "fused"), [(OnCuda, True), (nn.Parameter, None)])
def test_adamw_is_fused_on_a_gpu(kind: Any, fused: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **more: asked.update(more))
    model = nn.Module()
    model.weight = kind(torch.ones(2, 2))
    optim.build_optimizer(model, RunSettings(task="x", max_iters=1))
    assert asked["fused"] is fused


def test_memory_is_page_locked_for_a_gpu_only() -> None:
    run = RunSettings(task="x", max_iters=1)
    assert data.loader_settings(run, torch.device("cuda")).pin_memory
    assert not data.loader_settings(run, CPU).pin_memory


def test_attention_of_all_three_stacks_is_torchs_fused_one(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(golden_dir / "tokenizer")
    fused, shapes = torch.nn.functional.scaled_dot_product_attention, []

    def seen(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(query.shape[-2:]))
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    assert model.llama_model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        model.visual_encoder(torch.randn(1, 3, 28, 28))
        model.audio_encoder(torch.randn(1, 32, 32))
        model.llama_model(inputs_embeds=torch.randn(1, 7, 32))
    assert shapes == [(5, 8)] * 2 + [(4, 8)] * 2 + [(7, 8)] * 2
