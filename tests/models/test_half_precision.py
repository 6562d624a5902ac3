"""Products with half-precision weights in fp32: the numbers of fp32, rounded, and no weight kept in fp32."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge.models import half_precision
from lavis_chatbridge.models.losses import chunked_cross_entropy

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without products in half precision, whatever this one is; weights and inputs come in parts."""
    monkeypatch.setattr(half_precision, "is_slow_on_cpu", lambda dtype: dtype in HALVES)
    monkeypatch.setattr(half_precision, "VALUES_AT_ONCE", 70)
    monkeypatch.setattr(half_precision, "ROWS_AT_ONCE", 5)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "is_slow_on_cpu", lambda dtype: False)


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_those_of_fp32_rounded_once(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = drawn(3, 7, 33, dtype=dtype).requires_grad_(), drawn(19, 33, dtype=dtype)
    added = drawn(19, dtype=dtype) if bias else None
    exact = x.detach().float().requires_grad_()
    expected = functional.linear(exact, weight.float(), None if added is None else added.float())
    found = half_precision.linear(x, weight, added)
    assert (found.dtype, found.shape) == (dtype, (3, 7, 19))
    torch.testing.assert_close(found, expected.to(dtype), atol=0, rtol=torch.finfo(dtype).eps)
    slopes = drawn(3, 7, 19, dtype=dtype)
    found.backward(slopes)
    expected.backward(slopes.float())
    assert x.grad is not None
    assert exact.grad is not None
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, exact.grad.to(dtype), atol=1e-4, rtol=torch.finfo(dtype).eps)
    torch.testing.assert_close(half_precision.times(slopes, weight), x.grad, atol=0, rtol=0)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 7])
def test_an_input_in_fp32_is_rounded_nowhere(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    x, weight, added = torch.randn(rows, 33, requires_grad=True), drawn(19, 33, dtype=dtype), drawn(19, dtype=dtype)
    expected = functional.linear(x, weight.float(), added.float())
    (slope,) = torch.autograd.grad(expected.sum(), x)
    found = half_precision.linear(x, weight, added)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], slope, atol=1e-5, rtol=0)
    assert half_precision.input_dtype(weight) == torch.float32
    assert half_precision.input_dtype(weight.clone().requires_grad_()) == dtype


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("affine", [True, False])
def test_norms_take_both_precisions(affine: bool) -> None:
    torch.manual_seed(0)
    layer = nn.LayerNorm(33, elementwise_affine=affine)
    if affine:
        layer.weight.data.normal_()
        layer.bias.data.normal_()
    layer.requires_grad_(False).bfloat16()
    x = torch.randn(5, 33)
    native, exact = layer(x.bfloat16()), copy.deepcopy(layer).float()(x)
    half_precision.use_fp32_products(layer)
    assert ("forward" in vars(layer)) == affine  # without numbers of its own it takes both as it is
    assert torch.equal(layer(x.bfloat16()), native)
    assert torch.equal(layer(x), exact)


@pytest.mark.usefixtures("slow")
def test_what_is_kept_for_the_way_back_is_the_weight_itself() -> None:
    x, weight = drawn(9, 33, dtype=torch.bfloat16).requires_grad_(), drawn(19, 33, dtype=torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        half_precision.linear(x, weight)
    assert [(t.data_ptr(), t.dtype) for t in kept] == [(weight.data_ptr(), torch.bfloat16)]


@pytest.mark.usefixtures("slow")
def test_few_rows_other_precisions_and_trained_weights_take_torchs_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any) -> None:
        raise AssertionError("not in fp32")

    monkeypatch.setattr(half_precision._LinearInFp32, "apply", never)
    weight = drawn(19, 33, dtype=torch.bfloat16)
    few = drawn(2, 2, 33, dtype=torch.bfloat16)
    assert torch.equal(half_precision.linear(few, weight), functional.linear(few, weight))
    many = torch.randn(3, 7, 33)
    assert torch.equal(half_precision.linear(many, weight.float()), functional.linear(many, weight.float()))
    trained = weight.clone().requires_grad_()
    half_precision.linear(many.bfloat16(), trained).sum().backward()
    assert trained.grad is not None
    with torch.no_grad():
        half_precision.linear(few.clone().requires_grad_(), weight)
    for in_fp32 in (many.bfloat16(), few.clone().requires_grad_()):
        with pytest.raises(AssertionError, match="not in fp32"):
            half_precision.linear(in_fp32, weight)
    with pytest.raises(RuntimeError, match="dtype"):
        half_precision.linear(many.half(), weight)


@pytest.mark.usefixtures("slow")
def test_no_row_and_one_row_of_a_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "VALUES_AT_ONCE", 1)
    x, weight = drawn(6, 33, dtype=torch.bfloat16), drawn(3, 33, dtype=torch.bfloat16)
    expected = (x.float() @ weight.float().T).bfloat16()
    torch.testing.assert_close(half_precision.linear(x, weight), expected, atol=1e-5, rtol=2**-7)
    assert half_precision.linear(x[:0], weight).shape == (0, 3)
    assert half_precision.times(x[:0, :3], weight).shape == (0, 33)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", HALVES)
def test_convolutions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2).requires_grad_(False).to(dtype)
    x = drawn(2, 4, 9, 9, dtype=dtype)
    expected = copy.deepcopy(layer).float()(x.float()).to(dtype)
    half_precision.use_fp32_products(layer)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.float()).to(dtype), expected)
    line, weight = drawn(2, 4, 9, dtype=dtype), drawn(4, 2, 3, dtype=dtype)
    found = half_precision.convolve(functional.conv1d, line, weight, None, padding=1, groups=2)
    assert torch.equal(found, functional.conv1d(line.float(), weight.float(), padding=1, groups=2).to(dtype))


@pytest.mark.usefixtures("slow")
def test_frozen_half_precision_layers_alone_are_changed() -> None:
    class Quantised(nn.Linear):
        pass

    def elsewhere(layer: nn.Linear, x: Tensor) -> Tensor:
        return x

    own = nn.Linear(33, 19)
    layers = {"held": own, "fp32": nn.Linear(33, 19), "trained": nn.Linear(33, 19)}
    layers |= {"quantised": Quantised(33, 19), "spread": nn.Linear(33, 19)}
    model = nn.ModuleDict(layers).requires_grad_(False).bfloat16()
    layers["fp32"].float()
    layers["trained"].requires_grad_()
    layers["spread"].forward = MethodType(elsewhere, layers["spread"])  # type: ignore[method-assign]
    half_precision.use_fp32_products(model)
    assert {name for name, layer in layers.items() if "forward" in vars(layer)} == {"held", "spread"}
    x = drawn(9, 33, dtype=torch.bfloat16)
    assert torch.equal(layers["spread"](x), x)
    expected = functional.linear(x.float(), own.weight.float(), own.bias.float()).bfloat16()
    torch.testing.assert_close(own(x), expected, atol=0, rtol=2**-7)
    twin = copy.deepcopy(own)
    twin.weight.zero_()
    assert torch.equal(twin(x), own.bias.expand(9, -1))  # the copy multiplies by its own weight
    own.float()
    assert torch.equal(own(x.float()), functional.linear(x.float(), own.weight, own.bias))


@pytest.mark.usefixtures("fast")
def test_a_processor_with_products_of_its_own_is_left_alone() -> None:
    layer = nn.Linear(33, 19).requires_grad_(False).bfloat16()
    half_precision.use_fp32_products(layer)
    assert "forward" not in vars(layer)
    assert half_precision.input_dtype(layer.weight) == torch.bfloat16
    x = drawn(9, 33, dtype=torch.bfloat16)
    assert torch.equal(half_precision.linear(x, layer.weight, layer.bias), layer(x))
    assert torch.equal(half_precision.times(layer(x), layer.weight), layer(x) @ layer.weight)


@pytest.mark.usefixtures("slow")
def test_the_chunked_loss_agrees_with_a_processor_that_has_products(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    weight, targets = drawn(97, 32, dtype=torch.bfloat16) / 6, torch.randint(97, (23,))
    hidden = drawn(23, 32, dtype=torch.bfloat16)
    found = []
    for slow in (True, False):
        monkeypatch.setattr(half_precision, "is_slow_on_cpu", lambda dtype, slow=slow: slow)
        x = hidden.clone().requires_grad_()
        losses = chunked_cross_entropy(x, weight, None, targets, 8)
        losses.sum().backward()
        found.append((losses.detach(), x.grad))
    torch.testing.assert_close(found[0][0], found[1][0], atol=0.02, rtol=0)
    torch.testing.assert_close(found[0][1], found[1][1], atol=0.01, rtol=0.02)


def test_what_a_processor_can_do_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, bf16, fp16 in ((torch.bfloat16, False, True), (torch.float16, True, False)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda fp16=fp16: fp16)
        assert half_precision.without_products() == {dtype}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert half_precision.without_products() == set(HALVES)


def test_other_precisions_are_never_slow() -> None:
    assert not half_precision.is_slow_on_cpu(torch.float32)
    assert not half_precision.is_slow_on_cpu(torch.float64)
    assert [half_precision.is_slow_on_cpu(t) for t in HALVES] == [
        t in half_precision.without_products() for t in HALVES
    ]
