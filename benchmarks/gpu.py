"""Training steps of stage 1 and decoding at the paper's sizes on one GPU, beside what the GPU can do.

Run from the repository's root, on a GPU that nothing else uses; no weights and no data are needed::

    python benchmarks/gpu.py [--size 13b] [--kinds image video audio] [--rounds 5] [--write benchmarks/gpu.md]

``--size 7b`` takes Vicuna-7B's sizes; ``--size tiny`` runs anywhere in seconds, and shows only that the script runs.

The model is that of the shipped YAML (EVA-ViT-G, BEATs, Q-Former of BLIP-2, LLaMA) with random weights, drawn in bf16
on the device itself. A step is the package's own (``TrainStep``, ``precision: bf16``): media lie on the device already
(data is measured by data_speed.py), all captions are the same, so no position is padding. First it is checked that
losses are finite and that a step taken twice from the same weights gives the same loss and gradient norm. Then steps
are timed at the paper's batch of one process and at the largest batch that fits.

"MFU" is the share of the measured ceiling of matrix products (bf16, 8,192 x 8,192) that a step's own products take,
which torch's flop counter counts in one step. Decoding is held against the measured bandwidth of
copying: a token reads all weights but the embeddings once, and the keys and values of every row. "static" is the
static cache, whose step transformers compiles on a GPU (it needs a C compiler). All kinds at 13B should take about ten
minutes.

Goals: an MFU of 0.55, decoding at 0.6 of the bandwidth's ceiling, and a batch of 64 on 141 GB with 13B.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from common import circumstances, tell
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import LogitsProcessor, LogitsProcessorList

from lavis_chatbridge.files import write_text
from lavis_chatbridge.media.types import AudioClips
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.models.memory import training_memory
from lavis_chatbridge.models.settings import (
    AudioSettings,
    BeatsConfig,
    LanguageModelSettings,
    ModelSettings,
    PerceiverSettings,
    VisionSettings,
)
from lavis_chatbridge.models.weights import model_settings
from lavis_chatbridge.prompting import alignment_prompt
from lavis_chatbridge.runners import optim
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import StepResult, TrainStep

KINDS = ("image", "video", "audio")
CAPTION = "a red circle moves left above two big blue squares and a small green star moves right"
FRAMES, CLIP, MEL_BINS = 4, 1024, 64
MFU_GOAL, DECODE_GOAL, BATCH_GOAL = 0.55, 0.6, 64
_LLAMA = {"model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 2048}
LLAMAS: dict[str, dict[str, Any]] = {
    "13b": {**_LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
            "num_attention_heads": 40},
    "7b": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32},
    "tiny": {**_LLAMA, "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        batch: Samples of one process in the paper; the first row of each kind.
        most: The search for the largest batch ends here.
        matrix: Rows and columns of the products that give the ceiling.
        copied: Bytes of the tensor whose copying gives the bandwidth.
        decoded: Rows that are decoded together, one table row for each.
        new_tokens: Tokens of an answer.
        clip: Frames of a sound.
    """

    batch: int = 32
    most: int = 512
    matrix: int = 8192
    copied: int = 2 << 30
    decoded: tuple[int, ...] = (1, 8, 32)
    new_tokens: int = 64
    clip: int = CLIP


TINY = Plan(batch=2, most=4, matrix=256, copied=1 << 20, decoded=(2,), new_tokens=4, clip=64)


def settings_of(size: str) -> ModelSettings:
    """The shipped settings of a size, without files; the tiny one's are given here."""
    language_model = LanguageModelSettings(tokenizer="package:assets/tiny/llm", config=LLAMAS[size], dtype="bfloat16")
    if size == "tiny":
        beats = BeatsConfig(
            embed_dim=24, encoder_embed_dim=32, encoder_layers=2, encoder_ffn_embed_dim=48, encoder_attention_heads=4,
            conv_pos=8, conv_pos_groups=4, num_buckets=16, max_distance=40,
        )  # fmt: skip
        return ModelSettings(
            language_model=language_model,
            vision=VisionSettings(image_size=28, width=32, depth=2, heads=4, mlp_ratio=4.0, dtype="bfloat16"),
            audio=AudioSettings(config=beats, mask_padding=False, dtype="bfloat16"),
            perceiver=PerceiverSettings(width=32, layers=2, heads=4, feed_forward=48, queries=4),
        )
    shipped = model_settings(f"vicuna{size}")
    bare = {
        part: getattr(shipped, part).model_copy(update={"weights": None}) for part in ("vision", "audio", "perceiver")
    }
    return shipped.model_copy(update={**bare, "language_model": language_model, "checkpoint": None})


@contextlib.contextmanager
def drawn_in_half(device: torch.device) -> Iterator[None]:
    """New parameters are made in bf16, on the device: at no time is there a copy in fp32 or on the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build(settings: ModelSettings, device: torch.device) -> ChatBridge:
    """The model, frozen parts in bf16, and what is trained in fp32."""
    torch.manual_seed(0)
    with drawn_in_half(device):
        model = ChatBridge(settings)
    model.to(device)
    for norm in (model.ln_vision, model.ln_audio):
        norm.float()
    optim.keep_in_fp32(optim.trainable(model).values())
    return model.train()


def batch_of(kind: str, size: int, settings: ModelSettings, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Random media, each with the same caption."""
    rng = torch.Generator(device).manual_seed(1)
    pixels = (3, settings.vision.image_size, settings.vision.image_size)
    media: list[Any]
    if kind == "audio":
        frames = torch.full((1,), plan.clip)
        banks = torch.randn(size, 1, plan.clip, MEL_BINS, generator=rng, device=device)
        media = [AudioClips(bank, frames) for bank in banks]
    else:
        shape = pixels if kind == "image" else (FRAMES, *pixels)
        media = list(torch.randn(size, *shape, generator=rng, device=device))
    others: dict[str, Any] = {other: [[]] * size for other in KINDS if other != kind}
    pieces = [alignment_prompt((kind,), CAPTION)] * size  # type: ignore[arg-type]
    return {"sample_id": [str(i) for i in range(size)], "pieces": pieces, kind: [[m] for m in media], **others}


class Trainer:
    """The package's step over a model."""

    def __init__(self, model: ChatBridge, device: torch.device) -> None:
        run = RunSettings(task="chatbridge_alignment", max_iters=100_000, precision="bf16")
        optimizer = optim.build_optimizer(model, run)
        scaler, schedule = optim.build_scaler(run.precision, device), optim.schedule(run, 100_000)
        self._step = TrainStep(model, self._loss, optimizer, scaler, schedule, run, device)

    @staticmethod
    def _loss(model: Any, samples: Any) -> tuple[Tensor, Tensor]:
        out = model(samples)
        return out["loss"], out["target_tokens"]

    def step(self, batch: dict[str, Any]) -> StepResult:
        """One step; always the first of the run, with its dropout and its learning rate."""
        return self._step(0, [batch])


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Median of the rounds, after one call to warm up."""
    taken = []
    for turn in range(rounds + 1):
        synchronise(device)
        begin = time.perf_counter()
        function()
        synchronise(device)
        if turn:
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def ceilings(plan: Plan, rounds: int, device: torch.device) -> tuple[float, float]:
    """FLOP/s of products in bf16, and bytes/s read and written by copying."""
    a, b = (torch.randn(plan.matrix, plan.matrix, device=device).bfloat16() for _ in range(2))
    products = 2 * plan.matrix**3 / seconds_of(lambda: functional.linear(a, b), rounds, device)
    source = torch.ones(plan.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return products, 2 * plan.copied / seconds_of(lambda: target.copy_(source), rounds, device)


@contextlib.contextmanager
def seen(model: ChatBridge) -> Iterator[list[int]]:
    """The lengths of the rows of embeddings that the language model is given meanwhile."""
    lengths: list[int] = []

    def look(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        if keywords.get("inputs_embeds") is not None:
            lengths.append(keywords["inputs_embeds"].shape[1])

    handle = model.llama_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


def check(model: ChatBridge, batch: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Take the same step twice; its loss, and how far the second is from the first.

    Raises:
        RuntimeError: If a loss or gradient is not finite, or the steps differ.
    """
    parameters = optim.trainable(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    results = []
    with seen(model) as lengths:
        for _ in range(2):
            results.append(Trainer(model, device).step(batch))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])
    first, second = results
    if any(result.outcome != "ok" for result in results):
        raise RuntimeError(f"the steps ended {first.outcome!r} and {second.outcome!r}: loss {first.loss}")
    loss = abs(first.loss - second.loss) / first.loss
    norm = abs(first.grad_norm - second.grad_norm) / first.grad_norm
    if loss > 1e-3 or norm > 1e-2:
        raise RuntimeError(f"a step taken twice differs: loss {first.loss} and {second.loss}, norms by {norm:.1e}")
    return {"loss": first.loss, "loss differs": loss, "norm differs": norm, "tokens": first.tokens, "row": lengths[0]}


def fits(trial: Callable[[], Any]) -> bool:
    """Whether it runs in the device's memory; what a failed trial held is given back."""
    try:
        trial()
    except torch.OutOfMemoryError:
        fitted = False
    else:
        fitted = True
    if not fitted:  # here, where the error no longer holds the trial's frames
        gc.collect()
        torch.cuda.empty_cache()
    return fitted


def largest(fitting: Callable[[int], bool], first: int, most: int) -> int:
    """The largest batch that fits, to a quarter of it; zero if the first does not."""
    if not fitting(first):
        return 0
    batch = first
    while 2 * batch <= most and fitting(2 * batch):
        batch *= 2
    half = batch + batch // 2
    return half if half <= most and fitting(half) else batch


def measure_steps(model: ChatBridge, kinds: list[str], plan: Plan, rounds: int, device: torch.device) -> list[dict]:
    """One row for each kind and batch."""
    rows = []
    for kind in kinds:
        checked = check(model, batch_of(kind, 2, model.settings, plan, device), device)
        print(kind, checked, file=sys.stderr)
        trainer = Trainer(model, device)

        def fitting(batch: int, kind: str = kind, trainer: Trainer = trainer) -> bool:
            return fits(lambda: trainer.step(batch_of(kind, batch, model.settings, plan, device)))

        most = largest(fitting, plan.batch, plan.most)
        for batch in sorted({plan.batch, most} - {0}) if most else []:
            rows.append(measure_step(model, trainer, kind, batch, plan, rounds, device) | checked)
            print(kind, batch, rows[-1], file=sys.stderr)
        if not most:
            print(f"{kind}: a batch of {plan.batch} does not fit", file=sys.stderr)
    return rows


def measure_step(
    model: ChatBridge, trainer: Trainer, kind: str, batch: int, plan: Plan, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of a step and of its encoder, operations, and peak memory beside the estimate."""
    samples = batch_of(kind, batch, model.settings, plan, device)
    media = [medium[0] for medium in samples[kind]]
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with seen(model) as lengths:
        trainer.step(samples)
    taken = seconds_of(lambda: trainer.step(samples), rounds, device)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    with torch.no_grad():
        encoding = seconds_of(lambda: model.encode_media(kind, media), rounds, device)  # type: ignore[arg-type]
    settings, row = model.settings, lengths[0]
    with FlopCounterMode(display=False) as step_work:
        trainer.step(samples)
    with FlopCounterMode(display=False) as encoder_work, torch.no_grad():
        model.encode_media(kind, media)  # type: ignore[arg-type]
    like = settings.model_copy(update={"max_text_length": row - settings.perceiver.queries})
    estimate = sum(training_memory(like, batch).values())
    return {
        "kind": kind, "batch": batch, "seconds": taken, "encoding": encoding, "positions": batch * row,
        "all": step_work.get_total_flops(), "encoder": encoder_work.get_total_flops(),
        "peak": peak, "estimate": estimate,
    }  # fmt: skip


class Clock(LogitsProcessor):
    """Notes when each token's logits are there; it changes none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        synchronise(self._device)
        self.times.append(time.perf_counter())
        return scores


def token_seconds(model: ChatBridge, contexts: dict[str, Any], cache: Any, tokens: int, device: torch.device) -> float:
    """Seconds from one token to the next, over an answer's tokens."""
    clock = Clock(device)
    processors = LogitsProcessorList([clock])
    model.generate(contexts, max_length=tokens, min_length=tokens, stop="", cache=cache, logits_processor=processors)
    return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)


def measure_decoding(model: ChatBridge, plan: Plan, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for each number of answers and each cache; the time of a token, without prompt and media."""
    model.eval()
    rows = []
    for count in plan.decoded:
        batch = batch_of("image", count, model.settings, plan, device)
        contexts = {**batch, "pieces": [pieces[:-1] for pieces in batch["pieces"]]}
        with seen(model) as lengths:
            model.generate(contexts, max_length=1)
        for cache in ("dynamic", "static"):
            taken = [token_seconds(model, contexts, cache, plan.new_tokens, device) for _ in range(rounds + 2)]
            taken = taken[2:]  # the first two warm up and compile
            row = {"rows": count, "cache": cache, "seconds": statistics.median(taken)}
            rows.append(row | {"bytes": bytes_of_token(model.settings, count, lengths[0] + plan.new_tokens // 2)})
            print(rows[-1], file=sys.stderr)
    return rows


def bytes_of_token(settings: ModelSettings, rows: int, positions: int) -> int:
    """What decoding a token of every row reads: weights once, and keys and values of each row, in bf16."""
    llm = settings.language_model.config or {}
    block = 4 * llm["hidden_size"] ** 2 + 3 * llm["hidden_size"] * llm["intermediate_size"]
    weights = llm["num_hidden_layers"] * block + llm["vocab_size"] * llm["hidden_size"]
    return 2 * (weights + rows * positions * 2 * llm["num_hidden_layers"] * llm["hidden_size"])


def report(how: str, device: torch.device, limits: tuple[float, float], steps: list, decoding: list) -> str:
    """The tables in Markdown."""
    products, bandwidth = limits
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    lines = [
        "# The paper's sizes on one device",
        "",
        how,
        f"On {name}. Measured ceilings: {products / 1e12:.3g} TFLOP/s in bf16, {bandwidth / 1e9:.4g} GB/s.",
        "What is measured, and how it is counted, stands at the head of the script.",
        "",
        f"Training; goals: MFU {MFU_GOAL}, and a batch of {BATCH_GOAL} on 141 GB with 13B.",
        "",
        "| kind | batch | s/step | samples/s | positions/s | TFLOP/step | MFU | of the encoder | of the rest "
        "| encoder's time | peak GB | estimated GB | loss | step taken twice |",
        "|---|" + "---:|" * 13,
    ]
    for row in steps:
        whole, encoder, rest = row["all"], row["encoder"], row["seconds"] - row["encoding"]
        shares = (whole / row["seconds"], encoder / row["encoding"], (whole - encoder) / max(rest, 1e-9))
        peak = f"{row['peak'] / 1e9:.1f}" if row["peak"] else ""
        lines.append(
            f"| {row['kind']} | {row['batch']} | {row['seconds']:.3f} | {row['batch'] / row['seconds']:.1f} "
            f"| {row['positions'] / row['seconds']:.0f} | {whole / 1e12:.3g} | "
            + " | ".join(f"{share / products:.2f}" for share in shares)
            + f" | {row['encoding'] / row['seconds']:.0%} | {peak} | {row['estimate'] / 1e9:.1f} "
            f"| {row['loss']:.3f} | {row['loss differs']:.0e} |"
        )
    lines += ["", f"Decoding after one image; goal: {DECODE_GOAL} of the bandwidth's ceiling.", ""]
    lines += ["| rows | cache | ms/token | tokens/s | GB/token | of the ceiling |", "|---:|---|" + "---:|" * 4]
    for row in decoding:
        share = row["bytes"] / row["seconds"] / bandwidth
        lines.append(
            f"| {row['rows']} | {row['cache']} | {row['seconds'] * 1e3:.2f} | {row['rows'] / row['seconds']:.0f} "
            f"| {row['bytes'] / 1e9:.3g} | {share:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="13b", choices=list(LLAMAS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="measured repetitions")
    parser.add_argument("--write", type=Path, help="file for the tables")
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    if device.type != "cuda" and arguments.size != "tiny":
        parser.error(f"size {arguments.size} needs a CUDA device; --size tiny shows that the script runs")
    plan = TINY if arguments.size == "tiny" else Plan()
    limits = ceilings(plan, arguments.rounds, device)
    model = build(settings_of(arguments.size), device)
    options = (f"--size {arguments.size}", f"--rounds {arguments.rounds}")
    how = circumstances("gpu.py", *options, modules=(torch, transformers))
    steps = measure_steps(model, arguments.kinds, plan, arguments.rounds, device)
    if arguments.write:  # what is there, should compiling fail
        write_text(arguments.write, report(how, device, limits, steps, []))
    decoding = measure_decoding(model, plan, arguments.rounds, device)
    tell(report(how, device, limits, steps, decoding), arguments.write)


if __name__ == "__main__":
    main()
