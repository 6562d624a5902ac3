"""Training steps of stage 1 and decoding at the paper's sizes on one GPU, beside the GPU's measured ceilings.

Needs a GPU that nothing else uses, no weights and no data. ``--size tiny`` shows on a CPU that the script runs::

    python benchmarks/gpu.py [--size 13b] [--modalities image video audio] [--rounds 5] [--write benchmarks/gpu.md]

The model is that of the shipped YAML with random bf16 weights, its step the package's own. Media are on the device
already, and all captions are the same, so no position is padding. First, a step taken twice from the same weights must
give the same finite loss and gradient norm. "MFU" is the share of the measured bf16 matmul ceiling that a step's own
operations reach, as torch's flop counter counts them. Decoding is compared with the measured bandwidth of a copy: a
token reads all weights once, and the keys and values of every row.
"""

from __future__ import annotations

import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from common import Trainer, circumstances, command_line, write_table
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lavis_chatbridge.media.source import AudioClips
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.settings import LanguageModelSettings, ModelSettings
from lavis_chatbridge.models.weights import model_settings
from lavis_chatbridge.plugin.doctor import training_memory
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality, alignment_prompt
from lavis_chatbridge.runners.step import trainable

CAPTION = "a red circle moves left above two big blue squares and a small green star moves right"
FRAMES, MEL_BINS = 4, 64
MFU_GOAL, DECODE_GOAL, BATCH_GOAL = 0.55, 0.6, 64
_LLAMA = {"model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 2048}
_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMAS: dict[str, dict[str, Any]] = {
    "13b": _LLAMA | dict(zip(_NAMES, (5120, 13824, 40, 40), strict=True)),
    "7b": _LLAMA | dict(zip(_NAMES, (4096, 11008, 32, 32), strict=True)),
    "tiny": _LLAMA | {"vocab_size": 640} | dict(zip(_NAMES, (64, 96, 2, 4), strict=True)),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of the measurements."""

    batches: tuple[int, ...] = (32, BATCH_GOAL, 128, 256)  # samples of one process: the paper's, the goal and more
    matrix: int = 8192  # rows and columns of the matmuls that give the ceiling
    copied: int = 2 << 30  # bytes of the tensor that is copied for the bandwidth
    decoded: tuple[int, ...] = (1, 8, 32)  # rows that are decoded together
    new_tokens: int = 64
    clip: int = 1024  # frames of a sound


TINY = Plan(batches=(2, 4), matrix=256, copied=1 << 20, decoded=(2,), new_tokens=4, clip=64)


def settings_of(size: str) -> ModelSettings:
    """The shipped settings of a size without weight files, and a bf16 language model of that size."""
    shipped = model_settings("tiny" if size == "tiny" else f"vicuna{size}")
    llm = LanguageModelSettings(tokenizer="package:assets/tiny/llm", config=LLAMAS[size], dtype="bfloat16")
    parts: dict[str, Any] = {"language_model": llm, "checkpoint": None}
    for name in ("vision", "audio", "perceiver"):
        parts[name] = getattr(shipped, name).model_copy(update={"weights": None})
    return shipped.model_copy(update=parts)


def build(settings: ModelSettings, device: torch.device) -> ChatBridge:
    """The model on the device: frozen parts in bf16, trained parameters in fp32. No copy in fp32 is made before."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = ChatBridge(settings)
    finally:
        torch.set_default_dtype(before)
    model.to(device)
    for norm in (model.ln_vision, model.ln_audio):
        norm.float()
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model.train()


def batch_of(modality: Modality, size: int, settings: ModelSettings, plan: Plan, device: torch.device) -> dict:
    """``size`` random media, each with the same caption."""
    rng = torch.Generator(device).manual_seed(1)
    media: list[Any]
    if modality == "audio":
        banks = torch.randn(size, 1, plan.clip, MEL_BINS, generator=rng, device=device)
        media = [AudioClips(bank, torch.full((1,), plan.clip)) for bank in banks]
    else:
        side = settings.vision.image_size
        shape = (3, side, side) if modality == "image" else (FRAMES, 3, side, side)
        media = list(torch.randn(size, *shape, generator=rng, device=device))
    others: dict[str, Any] = {other: [[]] * size for other in MODALITIES if other != modality}
    pieces = [alignment_prompt((modality,), CAPTION)] * size
    return {"sample_id": [str(i) for i in range(size)], "pieces": pieces, modality: [[m] for m in media], **others}


def seconds_of(function: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Median of the rounds, after one call to warm up."""
    taken = []
    for turn in range(rounds + 1):
        begin = _now(device)
        function()
        if turn:
            taken.append(_now(device) - begin)
    return statistics.median(taken)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ceilings(plan: Plan, rounds: int, device: torch.device) -> tuple[float, float]:
    """FLOP/s of bf16 matmuls, and bytes/s read and written by copies."""
    a, b = (torch.randn(plan.matrix, plan.matrix, device=device).bfloat16() for _ in range(2))
    matmuls = 2 * plan.matrix**3 / seconds_of(lambda: functional.linear(a, b), rounds, device)
    source = torch.ones(plan.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return matmuls, 2 * plan.copied / seconds_of(lambda: target.copy_(source), rounds, device)


def check(model: ChatBridge, batch: dict, device: torch.device) -> dict[str, float]:
    """The loss of a step, and its relative difference from the same step taken again.

    Raises:
        RuntimeError: If a loss or gradient is not finite, or the steps differ.
    """
    parameters = trainable(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    results = []
    for _ in range(2):
        results.append(Trainer(model, device.type, precision="bf16").step(batch))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
    first, second = results
    loss = abs(first.loss - second.loss) / first.loss
    norm = abs(first.grad_norm - second.grad_norm) / max(first.grad_norm, 1e-9)
    if first.outcome != "ok" or second.outcome != "ok" or loss > 1e-3 or norm > 1e-2:
        raise RuntimeError(f"a step taken twice differs or is not finite: {first}, {second}")
    return {"loss": first.loss, "difference": loss}


def fits(trial: Callable[[], Any]) -> bool:
    """Whether a trial runs in the device's memory; the memory of a failed one is freed."""
    with suppress(torch.OutOfMemoryError):
        trial()
        return True
    gc.collect()  # here, where the error no longer holds the trial's frames
    torch.cuda.empty_cache()
    return False


def measure_steps(model: ChatBridge, modality: Modality, plan: Plan, rounds: int, device: torch.device) -> list[dict]:
    """A row for each batch that fits."""
    checked = check(model, batch_of(modality, 2, model.settings, plan, device), device)
    trainer = Trainer(model, device.type, precision="bf16")
    rows = []
    for size in plan.batches:
        batch = batch_of(modality, size, model.settings, plan, device)
        if not fits(lambda batch=batch: trainer.step(batch)):
            break
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        taken = seconds_of(lambda batch=batch: trainer.step(batch), rounds, device)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        with FlopCounterMode(display=False) as counter:
            trainer.step(batch)
        estimate = sum(training_memory(model.settings, size).values())
        row = {"modality": modality, "batch": size, "seconds": taken, "flop": counter.get_total_flops()}
        rows.append(row | {"peak": peak, "estimate": estimate} | checked)
        print(rows[-1], file=sys.stderr)
    return rows


def measure_decoding(model: ChatBridge, plan: Plan, rounds: int, device: torch.device) -> list[dict[str, float]]:
    """Seconds of a token after one image, without prompt and media, for each number of rows."""
    model.eval()
    rows = []
    for count in plan.decoded:
        batch = batch_of("image", count, model.settings, plan, device)

        def reply(tokens: int, batch: dict = batch) -> Any:
            return model.generate(batch, sampling=Sampling(max_new_tokens=tokens, ignore_eos=True))

        one = seconds_of(lambda reply=reply: reply(1), rounds, device)
        many = seconds_of(lambda reply=reply: reply(plan.new_tokens), rounds, device)
        llm = model.llama_model
        length = model.settings.perceiver.queries + plan.new_tokens // 2  # the prompt has few words
        keys = 2 * llm.config.num_hidden_layers * llm.config.hidden_size * length
        read = 2 * (sum(p.numel() for p in llm.parameters()) + count * keys)
        rows.append({"rows": count, "seconds": (many - one) / (plan.new_tokens - 1), "bytes": read})
        print(rows[-1], file=sys.stderr)
    return rows


def report(how: str, device: torch.device, limits: tuple[float, float], steps: list, decoding: list) -> str:
    """The tables in Markdown."""
    matmuls, bandwidth = limits
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    lines = ["# The paper's sizes on one device", "", how]
    lines += [f"On {name}. Ceilings: {matmuls / 1e12:.3g} TFLOP/s in bf16, {bandwidth / 1e9:.4g} GB/s.", ""]
    lines += [f"Training. Goals: MFU {MFU_GOAL}, and a batch of {BATCH_GOAL} on 141 GB with 13B.", ""]
    head = ("modality", "batch", "s/step", "samples/s", "TFLOP/step", "MFU", "peak GB", "estimated GB", "loss", "again")
    lines += [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in steps:
        peak = f"{row['peak'] / 1e9:.1f}" if row["peak"] else ""
        lines.append(
            f"| {row['modality']} | {row['batch']} | {row['seconds']:.3f} | {row['batch'] / row['seconds']:.1f} "
            f"| {row['flop'] / 1e12:.3g} | {row['flop'] / row['seconds'] / matmuls:.2f} | {peak} "
            f"| {row['estimate'] / 1e9:.1f} | {row['loss']:.3f} | {row['difference']:.0e} |"
        )
    lines += ["", f"Decoding after one image. Goal: {DECODE_GOAL} of the bandwidth.", ""]
    lines += ["| rows | ms/token | tokens/s | GB/token | of the bandwidth |", "|---:|---:|---:|---:|---:|"]
    for row in decoding:
        lines.append(
            f"| {row['rows']} | {row['seconds'] * 1e3:.2f} | {row['rows'] / row['seconds']:.0f} "
            f"| {row['bytes'] / 1e9:.3g} | {row['bytes'] / row['seconds'] / bandwidth:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    parser = command_line(__doc__)
    parser.add_argument("--size", default="13b", choices=list(LLAMAS))
    parser.add_argument("--modalities", nargs="+", default=list(MODALITIES), choices=list(MODALITIES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="measured repetitions")
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    if device.type != "cuda" and arguments.size != "tiny":
        parser.error(f"size {arguments.size} needs a CUDA device; --size tiny shows that the script runs")
    plan = TINY if arguments.size == "tiny" else Plan()
    limits = ceilings(plan, arguments.rounds, device)
    model = build(settings_of(arguments.size), device)
    options = (f"--size {arguments.size}", f"--rounds {arguments.rounds}")
    how = circumstances("gpu.py", *options, modules=(torch, transformers))
    steps = [row for m in arguments.modalities for row in measure_steps(model, m, plan, arguments.rounds, device)]
    decoding = measure_decoding(model, plan, arguments.rounds, device)
    write_table(report(how, device, limits, steps, decoding), arguments.write)


if __name__ == "__main__":
    main()
