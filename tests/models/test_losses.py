"""Cross-entropy in chunks: the same losses and gradients as in one piece, with few logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from lavis_chatbridge.models import losses
from tests.models.replies import tiny


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("trained", [False, True])
def test_chunks_give_what_one_piece_gives(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, trained: bool
) -> None:
    monkeypatch.setattr(losses, "LOGITS", 3 * 97)
    model = tiny("llama").to(dtype)
    head = model.get_output_embeddings().requires_grad_(trained)
    rows, columns = torch.arange(14) // 7, torch.arange(14) % 7
    targets, weights = torch.randint(97, (14,)), torch.rand(14)
    embeds = (torch.randn(2, 9, 32) * 0.2).to(dtype).requires_grad_()
    logits = model(inputs_embeds=embeds).logits[rows, columns].float()
    expected = functional.cross_entropy(logits, targets, reduction="none")
    learning = [embeds, head.weight] if trained else [embeds]
    slopes = torch.autograd.grad((expected * weights).sum(), learning)
    read: list[int] = []
    head.register_forward_hook(lambda _module, _inputs, logits: read.append(logits.shape[0]))
    found = losses.losses_at(model, rows, columns, targets, inputs_embeds=embeds)
    ours = torch.autograd.grad((found * weights).sum(), learning)
    assert found.dtype == torch.float32
    assert max(read) == 3
    assert sum(read) == 2 * 14
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    for own, slope in zip(ours, slopes, strict=True):
        torch.testing.assert_close(own, slope, atol=tolerance, rtol=tolerance)


def test_heads_that_scale_or_cap_their_logits_are_run_by_their_model() -> None:
    model: Any = tiny("granite", logits_scaling=3.0)
    embeds = torch.randn(1, 4, 32)
    found = losses.losses_at(model, torch.tensor([0]), torch.tensor([2]), torch.tensor([7]), inputs_embeds=embeds)
    expected = -model(inputs_embeds=embeds).logits[0, 2].log_softmax(-1)[7]
    torch.testing.assert_close(found[0], expected)
