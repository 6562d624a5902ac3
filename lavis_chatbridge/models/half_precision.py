"""Products with frozen weights in half precision, on a processor that cannot multiply in it.

Where instructions for bf16 or fp16 are missing (AVX2 alone, say), torch multiplies such matrices several times slower
than fp32 ones. There a few rows of a weight at a time are converted, multiplied in fp32 and forgotten: a frozen model
takes the memory of half precision and nearly the time of fp32 (benchmarks/half.md). Each result has the precision of
its input: half, as the processor's own product would have, or fp32, which spares the rounding where nothing of it is
kept. Everywhere else nothing is changed.

Shapes: ``I`` and ``O``, the widths of input and output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VALUES_AT_ONCE = 1 << 20
"""Values of a weight that are held in fp32 at once: 4 MiB, which caches hold."""

ROWS_AT_ONCE = 2048
"""Rows of an input that are held in fp32 at once."""

FEW_ROWS = 4
"""Up to so many rows, torch's own product takes as long as reading the weight does, so it is taken; its way back, which
takes much longer, is not."""


def is_slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this processor has no products of its own in a precision."""
    return dtype in _SLOW


def without_products() -> frozenset[torch.dtype]:
    """The half precisions that torch has no fast products for on this processor."""
    if not torch.backends.mkldnn.is_available():
        return frozenset((torch.bfloat16, torch.float16))
    asked = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return frozenset(dtype for dtype, has in asked.items() if not has())


_SLOW = without_products()


def input_dtype(weight: Tensor) -> torch.dtype:
    """The precision of an encoder's input: its weight's, or fp32 where it multiplies in that."""
    return torch.float32 if _is_slow(weight) else weight.dtype


def use_fp32_products(module: nn.Module) -> None:
    """Let the frozen linear, convolutional and normalising layers of a module work as below, where that is faster.

    Layers that are trained, quantised or spread over devices stay as they are.
    """
    layer: Any
    for layer in module.modules():
        own = _FORWARDS.get(type(layer))
        if own is not None and "forward" not in vars(layer) and _is_slow(layer.weight):
            layer.forward = partial(own, layer)  # which can be pickled


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``functional.linear``; in fp32 inside where the weight is frozen and the processor slow in its precision.

    Args:
        x: ``[..., I]`` in the weight's precision or, with such a weight, in fp32; gradients reach it.
        weight: ``[O, I]``.
        bias: ``[O]``; none of its gradient where the weight is frozen.

    Returns:
        ``[..., O]`` in the input's precision.
    """
    goes_back = torch.is_grad_enabled() and x.requires_grad
    few = x.dtype == weight.dtype and x.numel() <= FEW_ROWS * x.shape[-1] and not goes_back
    if few or not _pays(x, weight):
        return functional.linear(x, weight, bias)
    result: Any = _LinearInFp32.apply(x, weight, bias)
    return result


def times(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight``, the way back through :func:`linear`, without a gradient of its own.

    Args:
        x: ``[..., O]``, as above.
        weight: ``[O, I]``.

    Returns:
        ``[..., I]`` in the input's precision.
    """
    if not _pays(x, weight):
        return x @ weight
    flat = x.detach().reshape(-1, len(weight))
    result = x.new_empty(len(flat), weight.shape[1])
    height = _height(weight)
    for some, target in zip(flat.split(ROWS_AT_ONCE), result.split(ROWS_AT_ONCE), strict=True):
        total = torch.zeros_like(target, dtype=torch.float32)
        for part, columns in zip(weight.split(height), some.split(height, dim=1), strict=True):
            torch.addmm(total, columns.float(), part.float(), out=total)  # torch counts no products in `addmm_`
        target.copy_(total)
    return result.view(*x.shape[:-1], weight.shape[1])


def convolve(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, **sizes: Any) -> Tensor:
    """A convolution, ``functional.conv2d`` say; in fp32 inside, as :func:`linear`, with the whole weight converted.

    Args:
        function: The convolution.
        x: Its input, as above.
        weight: Its weight.
        bias: Its bias.
        **sizes: Its stride, padding, dilation and groups.
    """
    if not _pays(x, weight):
        return function(x, weight, bias, **sizes)
    return function(x.float(), weight.float(), None if bias is None else bias.float(), **sizes).to(x.dtype)


class _LinearInFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        flat = x.reshape(-1, x.shape[-1])
        result = x.new_empty(len(flat), len(weight))
        height = _height(weight)
        for some, target in zip(flat.split(ROWS_AT_ONCE), result.split(ROWS_AT_ONCE), strict=True):
            rows = some.float()
            for begin in range(0, len(weight), height):
                own = slice(begin, begin + height)
                added = None if bias is None else bias[own].float()
                target[:, own] = functional.linear(rows, weight[own].float(), added)
        return result.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return times(gradients[0], weight), None, None


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _conv2d(layer: nn.Conv2d, x: Tensor) -> Tensor:
    sizes = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return convolve(functional.conv2d, x, layer.weight, layer.bias, **sizes)


def _layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if of is None else of.to(x.dtype) for of in (layer.weight, layer.bias))
    return functional.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.LayerNorm: _layer_norm,
}


def _pays(x: Tensor, weight: Tensor) -> bool:
    return x.dtype in (weight.dtype, torch.float32) and _is_slow(weight)


def _is_slow(weight: Tensor | None) -> bool:
    if weight is None or weight.requires_grad:
        return False
    return weight.device.type == "cpu" and is_slow_on_cpu(weight.dtype)


def _height(weight: Tensor) -> int:
    """Rows of a weight that are converted at once."""
    return max(1, VALUES_AT_ONCE // weight.shape[1])
