"""How long a configuration's training takes: its products, counted, at the rate that a device is measured at.

Everything else that a step does (norms, data, the optimiser) comes on top, so a GPU takes up to twice as long.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from lavis_chatbridge.models import half_precision
from lavis_chatbridge.models.settings import ModelSettings, torch_dtype
from lavis_chatbridge.models.work import work
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.runners.settings import RunSettings

SHORT = 32
"""Tokens of a short text: a caption."""
_SIDES = {"cpu": 1024, "cuda": 8192}
_TURNS = 3


def step_seconds(
    settings: ModelSettings, llm: Mapping[str, Any], run: RunSettings, rate: float
) -> dict[Modality, tuple[float, float]]:
    """Seconds of a step on each kind of medium: with short texts, and with the longest.

    Args:
        settings: Of the model.
        llm: The language model's ``config.json``.
        run: Of the training.
        rate: Floating-point operations of products in a second.

    Raises:
        KeyError: If the language model is not LLaMA-like.
    """
    longest = settings.max_text_length
    texts = (min(SHORT, longest), longest)
    return {kind: tuple(_seconds(settings, llm, run, kind, text, rate) for text in texts) for kind in MODALITIES}  # type: ignore[misc]


def products_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations of a product with a square frozen weight in a second: the best of three."""
    side = _SIDES.get(device.type, _SIDES["cuda"])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    taken = []
    for _ in range(1 + _TURNS):  # the first warms up
        begin = time.perf_counter()
        half_precision.linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return 2 * side**3 / min(taken[1:])


def describe(settings: ModelSettings, llm: Mapping[str, Any], run: RunSettings, device: torch.device) -> str:
    """The estimate as a line of ``chatbridge doctor``.

    Raises:
        KeyError: If the language model is not LLaMA-like.
    """
    dtype = torch_dtype(settings.language_model.dtype)
    rate = products_per_second(device, dtype)
    kinds = step_seconds(settings, llm, run, rate)
    each = ", ".join(f"{kind} {in_words(short)} to {in_words(long)}" for kind, (short, long) in kinds.items())
    precision = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and half_precision.is_slow_on_cpu(dtype):
        precision = f"float32 of {precision} weights (this processor is slow in {precision})"
    text = f"time of a step, its products alone at the {rate / 1e12:.3g} TFLOP/s in {precision} "
    text += f"that {device.type} was just measured at: {each} (texts of {SHORT} tokens, and the longest)"
    if run.max_iters is None:
        return text
    ends = [run.max_iters * edge(pair[i] for pair in kinds.values()) for i, edge in enumerate((min, max))]
    return f"{text}; {run.max_iters} steps: {in_words(ends[0])} to {in_words(ends[1])}"


def in_words(seconds: float) -> str:
    """A duration with two digits and a unit."""
    for size, unit, least in ((86400, "days", 2), (3600, "h", 2), (60, "min", 2), (1, "s", 1)):
        if seconds >= least * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e3:.0f} ms"


def _seconds(
    settings: ModelSettings, llm: Mapping[str, Any], run: RunSettings, kind: Modality, text: int, rate: float
) -> float:
    row = settings.perceiver.queries + text
    batch = run.batch_size_train if run.batch_tokens is None else max(1, run.batch_tokens // row)
    found = work(settings, llm, kind, batch, row, batch * text)
    encoder = 0.0 if run.feature_cache is not None else found.encoder
    return run.accum_grad_iters * (encoder + found.bridge + found.language_model) / rate
