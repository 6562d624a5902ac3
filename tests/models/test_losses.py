"""Cross-entropy in chunks: the same losses and gradients as in one piece, with no logits kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lavis_chatbridge.models.losses import chunked_cross_entropy, losses_at
from tests.models.replies import tiny


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_what_one_piece_gives(chunk: int, bias: bool) -> None:
    torch.manual_seed(1)
    head = nn.Linear(32, 97, bias=bias).requires_grad_(False)
    hidden = torch.randn(23, 32, requires_grad=True)
    targets, weights = torch.randint(97, (23,)), torch.rand(23)
    expected = functional.cross_entropy(head(hidden), targets, reduction="none")
    (slope,) = torch.autograd.grad((expected * weights).sum(), hidden)
    found = chunked_cross_entropy(hidden, head.weight, head.bias, targets, chunk)
    (ours,) = torch.autograd.grad((found * weights).sum(), hidden)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours, slope, atol=1e-6, rtol=0)


def test_half_precision_ends_in_fp32() -> None:
    torch.manual_seed(2)
    weight, hidden = torch.randn(97, 32) / 6, torch.randn(23, 32)
    targets = torch.randint(97, (23,))
    expected = functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    half = hidden.bfloat16().requires_grad_()
    found = chunked_cross_entropy(half, weight.bfloat16(), None, targets, 8)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found.detach(), expected, atol=0.03, rtol=0)


def test_no_tensor_of_all_logits_is_kept_for_the_backward_pass() -> None:
    head = nn.Linear(32, 997, bias=False).requires_grad_(False)
    hidden = torch.randn(64, 32, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chunked_cross_entropy(hidden, head.weight, None, torch.randint(997, (64,)), 16)
    assert kept == [64 * 32]


def test_an_output_layer_that_is_trained_gets_its_gradient() -> None:
    model = tiny("llama")
    head = model.get_output_embeddings().requires_grad_(True)
    embeds = torch.randn(1, 4, 32)
    losses_at(model, torch.tensor([0]), torch.tensor([2]), torch.tensor([7]), inputs_embeds=embeds).sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad[7].abs().sum() > 0
