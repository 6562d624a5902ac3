"""One training step of stage 1 and one answer, at a middle size on one CPU core, against a plain reference.

Run from the repository's root, on a quiet machine::

    OMP_NUM_THREADS=1 python benchmarks/step.py [--rounds 5] [--variants ...] [--write benchmarks/step.md]

On a processor without instructions for bf16, frozen parts are held in bf16 and multiply in fp32. ``--memory-only``
names variants of which no step is timed.

The sizes: EVA-ViT of 12 layers x 384 (224-pixel images, 257 tokens), BEATs 6 x 384 (clips of 10 s, 64 mel bins, 256
tokens), perceiver 6 x 384 with 32 queries, LLaMA 12 x 512 with a vocabulary of 32,000; random weights, no dropout. The
batches: 8 images, 4 videos of 4 frames, 8 sounds of 2 full clips, each with a caption of 6 to 20 words. Four steps are
timed together: plain takes their samples as they are drawn, ours in batches of similar lengths, by the training's own
plan (`run.group_by_length`; it sorts 32 batches at a time, here 4).

The plain reference is written here and works as the original's code does: frames and clips pass their encoder one after
the other, attention in all three stacks is two products and a softmax, logits of every position of the padded batch are
computed and shifted against the labels, AdamW takes one parameter after the other and gradients are set to zero. It
has the same weights and is given the same samples; only the perceiver (LAVIS's) is the same code. "ours" is the
package's own training step (`TrainStep`), "compiled" is ``run.compile``. The variants take turns, and the medians of
processor time count. Memory is the peak of a process of its own that builds the model and takes two steps, above what
it has after the imports.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from common import circumstances, status, tell
from torch import Tensor
from torch.nn import functional

from lavis_chatbridge.datasets.plan import MixturePlan
from lavis_chatbridge.media.types import AudioClips, EncodedMedium
from lavis_chatbridge.models import layout
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.models.encoders.beats import relative_buckets
from lavis_chatbridge.models.perceiver import perceive
from lavis_chatbridge.models.settings import (
    AudioSettings,
    BeatsConfig,
    LanguageModelSettings,
    ModelSettings,
    PerceiverSettings,
    VisionSettings,
)
from lavis_chatbridge.prompting import alignment_prompt
from lavis_chatbridge.runners import optim
from lavis_chatbridge.runners.parallel import frozen_blocks
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import TrainStep

BATCHES = {"image": 8, "video": 4, "audio": 8}
STEPS = 4
FRAMES, CLIPS, CLIP, MEL_BINS = 4, 2, 1024, 64
NEW_TOKENS = 24
BEATS = BeatsConfig(encoder_layers=6, encoder_embed_dim=384, encoder_ffn_embed_dim=1536, encoder_attention_heads=6)
LLAMA = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1376,
    "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 2048,
}  # fmt: skip
GOALS = {
    ("image", "fp32"): 1.2, ("audio", "fp32"): 1.2, ("video", "fp32"): 1.05,
    ("image", "fp32, compiled"): 1.2, ("audio", "fp32, compiled"): 1.2, ("video", "fp32, compiled"): 1.05,
    ("image", "bf16"): 2.0, ("video", "bf16"): 2.0, ("audio", "bf16"): 2.0,
    ("image", "bf16, cached"): 3.0, ("video", "bf16, cached"): 7.0, ("audio", "bf16, cached"): 3.0,
}  # fmt: skip
VARIANTS = ("plain", "fp32", "fp32, compiled", "fp32, cached", "bf16", "bf16, cached")
WORDS = ("a", "red", "circle", "moves", "left", "blue", "square", "green", "star", "above", "two", "big", "small")


def build(dtype: str) -> ChatBridge:
    """The model of the middle size; the same random weights whatever the precision of its frozen parts."""
    precision: Any = dtype
    torch.manual_seed(0)
    settings = ModelSettings(
        language_model=LanguageModelSettings(tokenizer="package:assets/tiny/llm", config=LLAMA, dtype=precision),
        vision=VisionSettings(width=384, depth=12, heads=6, mlp_ratio=4.0, dtype=precision),
        audio=AudioSettings(config=BEATS, mask_padding=False, dtype=precision),
        perceiver=PerceiverSettings(width=384, layers=6, heads=6, feed_forward=1536, dropout=0.0),
    )
    return ChatBridge(settings).train()


def batches_of(kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same samples twice: in batches as they are drawn, and in the training plan's batches of similar lengths."""
    size = BATCHES[kind]
    media, captions = media_of(kind, STEPS * size), captions_of(STEPS * size)
    lengths = np.array([len(caption.split()) for caption in captions])
    plan = MixturePlan({kind: len(captions)}, batch_size=size, lengths={kind: lengths}, group=STEPS)
    grouped = [[index for index, _ in plan.batch(step)[1]] for step in range(STEPS)]
    drawn = np.arange(len(captions)).reshape(STEPS, size).tolist()
    return tuple([_batch(kind, media, captions, rows) for rows in order] for order in (drawn, grouped))  # type: ignore[return-value]


def media_of(kind: str, count: int) -> list[Any]:
    """Random media."""
    rng = torch.Generator().manual_seed(1)
    if kind == "audio":
        frames = torch.full((CLIPS,), CLIP)
        return [AudioClips(torch.randn(CLIPS, CLIP, MEL_BINS, generator=rng), frames) for _ in range(count)]
    shape = (3, 224, 224) if kind == "image" else (FRAMES, 3, 224, 224)
    return [torch.randn(*shape, generator=rng) for _ in range(count)]


def captions_of(count: int) -> list[str]:
    """Captions whose lengths differ as those of real ones do."""
    words = np.random.default_rng(2)
    return [" ".join(words.choice(WORDS, words.integers(6, 21))) for _ in range(count)]


def _batch(kind: str, media: list[Any], captions: list[str], rows: list[int]) -> dict[str, Any]:
    pieces = [alignment_prompt((kind,), captions[row]) for row in rows]  # type: ignore[arg-type]
    others: dict[str, Any] = {other: [[]] * len(rows) for other in BATCHES if other != kind}
    return {"sample_id": [str(row) for row in rows], "pieces": pieces, kind: [[media[row]] for row in rows], **others}


def cached(model: ChatBridge, batch: dict[str, Any], kind: str) -> dict[str, Any]:
    """The batch as a feature cache gives it."""
    encoded = model.encode_media(kind, [media[0] for media in batch[kind]])  # type: ignore[arg-type]
    stored = [[EncodedMedium(medium.tokens.half(), medium.mask)] for medium in encoded]
    return {**batch, kind: stored}


class Plain:
    """The reference: the model's weights, worked as the original's code works them."""

    def __init__(self) -> None:
        self.model = build("float32")
        for block in self.model.visual_encoder.blocks:
            del block.attn.forward  # LAVIS's own attention
        self.model.llama_model.set_attn_implementation("eager")
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, foreach=False, fused=False)

    def step(self, batch: dict[str, Any], kind: str) -> float:
        """One training step."""
        loss = self.loss(batch, kind)
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def loss(self, batch: dict[str, Any], kind: str) -> Tensor:
        """The loss, from logits at every position."""
        model = self.model
        embeds, laid = self.embeds(batch, kind)
        out = model.llama_model(
            inputs_embeds=embeds, attention_mask=laid.attention_mask, return_dict=True, use_cache=False
        )
        logits = out.logits.float()
        shifted, labels = logits[:, :-1].contiguous(), laid.labels[:, 1:].contiguous()
        return functional.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels.view(-1))

    def embeds(self, batch: dict[str, Any], kind: str) -> tuple[Tensor, Any]:
        """The padded rows of a batch, with soft tokens of media encoded frame by frame or clip by clip."""
        model = self.model
        media = [medium[0] for medium in batch[kind]]
        tokens = self.hear(media) if kind == "audio" else self.see(media)
        queries = model.audio_query_tokens if kind == "audio" else model.image_query_tokens
        mask = torch.ones(tokens.shape[:2], dtype=torch.long)
        soft = model.llama_proj(perceive(model.Qformer, queries, tokens, mask))
        count = soft.shape[1]
        places: list[Any] = [{(kind, 0): range(i * count, (i + 1) * count)} for i in range(len(media))]
        laid = layout.lay_out(batch["pieces"], places, model.llama_tokenizer, "text", 150)
        return layout.embed(laid, soft.flatten(0, 1), model.llama_model.get_input_embeddings()), laid

    def see(self, media: list[Tensor]) -> Tensor:
        """``[B, T * N, D]``, one frame of each video after the other."""
        frames = torch.stack([medium if medium.dim() == 4 else medium[None] for medium in media], dim=1)
        return torch.cat([self.model.ln_vision(self.model.visual_encoder(frame)) for frame in frames], dim=1)

    def hear(self, media: list[AudioClips]) -> Tensor:
        """``[B, T * N, D]``, one clip of each sound after the other."""
        model = self.model
        clips = torch.stack([medium.fbank for medium in media], dim=1)
        heard = [model.audio_trans(model.ln_audio(plain_beats(model.audio_encoder, clip))) for clip in clips]
        return torch.cat(heard, dim=1)

    def answer(self, batch: dict[str, Any], kind: str) -> list[str]:
        """Greedy answers, each sample on its own as the original's demonstration does."""
        model, texts = self.model, []
        for i, pieces in enumerate(batch["pieces"]):
            one = {"pieces": [pieces[:-1]], kind: batch[kind][i : i + 1]}
            with torch.no_grad():
                embeds, _ = self.embeds(one, kind)
                ids = model.llama_model.generate(
                    inputs_embeds=embeds,
                    attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                    do_sample=False,
                )
            texts.append(model.llama_tokenizer.decode(ids[0]))
        return texts


def plain_beats(beats: Any, fbank: Tensor) -> Tensor:
    """BEATs as published: the bias of every pair looked up, products, each row's maximum taken off before softmax."""
    config, encoder = beats.config, beats.encoder
    with torch.no_grad():
        x = beats.post_extract_proj(beats.patches(fbank))
        x = encoder.layer_norm(x + encoder.pos_conv(x.transpose(1, 2)).transpose(1, 2))
        size = torch.arange(x.shape[1])
        buckets = relative_buckets(size[None, :] - size[:, None], config.num_buckets, config.max_distance)
        bias = encoder.layers[0].self_attn.relative_attention_bias(buckets).permute(2, 0, 1)
        for layer in encoder.layers:
            x = layer.self_attn_layer_norm(x * layer.residual_scale + _plain_attention(layer.self_attn, x, bias))
            x = layer.final_layer_norm(x * layer.residual_scale + layer.fc2(functional.gelu(layer.fc1(x))))
    return x


def _plain_attention(own: Any, x: Tensor, bias: Tensor) -> Tensor:
    linears = (own.q_proj, own.k_proj, own.v_proj)
    q, k, v = (linear(x).unflatten(-1, (own.heads, -1)).transpose(1, 2) for linear in linears)
    scores = (q * (q.shape[-1] ** -0.5 / 32)) @ k.transpose(-2, -1)
    scores = (scores - scores.max(dim=-1, keepdim=True).values) * 32
    update, reset = torch.sigmoid(own.grep_linear(q).unflatten(-1, (2, 4)).sum(-1)).chunk(2, dim=-1)
    gate = update * (reset * own.grep_a - 1.0) + 2.0
    weights = (scores + gate * bias.unsqueeze(0).expand(len(x), -1, -1, -1)).softmax(-1)
    return own.out_proj((weights @ v).transpose(1, 2).flatten(2))


class Ours:
    """The package's own step."""

    def __init__(self, dtype: str, compiled: bool = False) -> None:
        self.model = build(dtype)
        for block in frozen_blocks(self.model) if compiled else []:
            block.compile()
        device = torch.device("cpu")
        run = RunSettings(task="chatbridge_alignment", max_iters=100_000, clip_grad_norm=None, decay_all=True)
        optimizer = optim.build_optimizer(self.model, run)
        scaler, schedule = optim.build_scaler("fp32", device), optim.schedule(run, 100_000)
        self._step = TrainStep(self.model, self._loss, optimizer, scaler, schedule, run, device)
        self._taken = 0

    @staticmethod
    def _loss(model: Any, samples: Any) -> tuple[Tensor, Tensor]:
        out = model(samples)
        return out["loss"], out["target_tokens"]

    def step(self, batch: dict[str, Any], kind: str) -> float:
        """One training step."""
        result = self._step(self._taken, [batch])
        self._taken += 1
        return result.loss

    def answer(self, batch: dict[str, Any], kind: str) -> list[str]:
        """Greedy answers of the whole batch at once."""
        return self.model.generate(batch, max_length=NEW_TOKENS, min_length=NEW_TOKENS, stop="", bos=True)


def make(variant: str) -> Any:
    """The side that a variant is run by."""
    if variant == "plain":
        return Plain()
    return Ours("bfloat16" if variant.startswith("bf16") else "float32", compiled="compiled" in variant)


def in_turns(functions: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of processor time of each function; one call to warm up, then all in turns."""
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, own in zip(functions, seconds, strict=True):
            begin = time.process_time()
            function()
            if turn:
                own.append(time.process_time() - begin)
    return [statistics.median(own) for own in seconds]


def times(kind: str, rounds: int, variants: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step, and the mean loss of the batches that plain is given, of each variant."""
    drawn, grouped = batches_of(kind)
    made = {name: make(name) for name in dict.fromkeys(map(_model_of, variants))}
    sides = {variant: made[_model_of(variant)] for variant in variants}
    losses, work = {}, {}
    for variant, side in sides.items():
        plain = variant == "plain"
        with torch.no_grad():
            batches = given(variant, side, drawn, kind)
            found = [side.loss(batch, kind) if plain else side.model(batch)["loss"] for batch in batches]
        losses[variant] = float(torch.stack(found).mean())
        work[variant] = given(variant, side, drawn if plain else grouped, kind)
    functions = [lambda v=v, s=s: [s.step(batch, kind) for batch in work[v]] for v, s in sides.items()]  # type: ignore[misc]
    return {v: seconds / STEPS for v, seconds in zip(sides, in_turns(functions, rounds), strict=True)}, losses


def given(variant: str, side: Any, batches: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The batches as a variant is given them."""
    return [cached(side.model, batch, kind) for batch in batches] if "cached" in variant else batches


def _model_of(variant: str) -> str:
    """The variant whose model it shares: cached features need no other one."""
    return variant.removesuffix(", cached")


def answering(rounds: int, variants: list[str]) -> dict[str, float]:
    """Seconds for the answers of a batch of images."""
    batch = batches_of("image")[0][0]
    sides = {variant: make(variant) for variant in variants if "," not in variant}
    for side in sides.values():
        side.model.eval()
    contexts = {**batch, "pieces": [pieces[:-1] for pieces in batch["pieces"]]}
    if "fp32" in sides and sides["plain"].answer(batch, "image") != sides["fp32"].answer(contexts, "image"):
        print("the answers of plain and fp32 differ", file=sys.stderr)
    functions = [lambda s=s, p=v == "plain": s.answer(batch if p else contexts, "image") for v, s in sides.items()]  # type: ignore[misc]
    return dict(zip(sides, in_turns(functions, rounds), strict=True))


def profile(kind: str) -> dict[str, float]:
    """Seconds of the parts of a plain step, from the passes forward of each and of the whole backward pass."""
    plain, batch = Plain(), batches_of(kind)[0][0]
    media = [medium[0] for medium in batch[kind]]
    parts = {}
    for _ in range(2):  # the first time warms up
        marks = [time.process_time()]
        with torch.no_grad():
            tokens = plain.hear(media) if kind == "audio" else plain.see(media)
        marks.append(time.process_time())
        embeds, laid = plain.embeds(batch, kind)
        marks.append(time.process_time())
        hidden = plain.model.llama_model.model(
            inputs_embeds=embeds, attention_mask=laid.attention_mask
        ).last_hidden_state
        marks.append(time.process_time())
        cut = hidden.detach().requires_grad_()
        logits = plain.model.llama_model.lm_head(cut).float()[:, :-1].contiguous()
        functional.cross_entropy(logits.view(-1, logits.shape[-1]), laid.labels[:, 1:].reshape(-1)).backward()
        marks.append(time.process_time())
        hidden.backward(cut.grad)
        marks.append(time.process_time())
        plain.optimizer.step()
        marks.append(time.process_time())
        encoder, embedding, llm, head, backward, optimizer = np.diff(marks)
        parts = {
            "encoder": encoder,
            "perceiver forward": max(0.0, embedding - encoder),
            "language model forward": llm,
            "logits and loss, both ways": head,
            "backward": backward,
            "AdamW": optimizer,
        }
        del tokens
    return parts


def products() -> dict[str, float]:
    """GFLOP/s of this core's matrix products, by precision, at the feed-forward sizes of the vision encoder."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2056, 384).to(dtype), torch.randn(1536, 384).to(dtype)
        (seconds,) = in_turns([lambda a=a, b=b: functional.linear(a, b)], 5)  # type: ignore[misc]
        found[name] = 2 * 2056 * 384 * 1536 / seconds / 1e9
    return found


def memory_of(variant: str, kind: str) -> int:
    """Bytes: the peak of this process after two steps, above what it had before the model was built."""
    torch.set_num_threads(1)
    before = status("VmRSS")
    batch = batches_of(kind)[0][0]
    side = make(variant)
    if "cached" in variant:
        batch = cached(side.model, batch, kind)
    for _ in range(2):
        side.step(batch, kind)
    return status("VmHWM") - before


def memory(kinds: list[str], variants: list[str]) -> dict[tuple[str, str], int]:
    """Peak bytes of each variant, each measured in a process of its own."""
    found = {}
    for kind in kinds:
        for variant in variants:
            command = [sys.executable, __file__, "--memory-of", variant, kind]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            found[kind, variant] = int(result.stdout)
            print(f"memory, {kind}, {variant}: {found[kind, variant] / 1e6:.0f} MB", file=sys.stderr)
    return found


def measure(rounds: int, kinds: list[str], variants: list[str], memory_only: list[str]) -> SimpleNamespace:
    """Everything that the table holds."""
    result = SimpleNamespace(seconds={}, losses={}, parts={}, products=products())
    for kind in kinds:
        result.seconds[kind], result.losses[kind] = times(kind, rounds, variants)
        result.parts[kind] = profile(kind)
        print(kind, json.dumps({k: round(v, 3) for k, v in result.seconds[kind].items()}), file=sys.stderr)
        print(kind, json.dumps({k: round(v, 5) for k, v in result.losses[kind].items()}), file=sys.stderr)
        print(kind, json.dumps({k: round(v, 3) for k, v in result.parts[kind].items()}), file=sys.stderr)
    result.answers = answering(rounds, variants)
    result.memory = memory(kinds, [*variants, *memory_only])
    return result


def report(result: SimpleNamespace, options: list[str]) -> str:
    """The tables in Markdown."""
    lines = [
        "# A training step on one CPU core",
        "",
        circumstances("step.py", *options, modules=(torch, transformers)),
        f"One thread of {_cpu()}. What is compared, and with what, stands at the head of the script.",
        "",
        "| kind | variant | s/step | ratio | goal | loss - plain | peak MB | of plain | goal |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (kind, variant), bytes_ in result.memory.items():
        seconds, losses = result.seconds[kind], result.losses[kind]
        timed = ["", "", ""]
        if variant in seconds:
            goal = GOALS.get((kind, variant), "")
            timed = [f"{seconds[variant]:.2f}", f"{seconds['plain'] / seconds[variant]:.2f}", str(goal)]
        difference = f"{losses[variant] - losses['plain']:+.1e}" if variant in losses else ""
        space = [
            f"{bytes_ / 1e6:.0f}",
            f"{bytes_ / result.memory[kind, 'plain']:.2f}",
            "" if variant == "plain" else "0.6",
        ]
        lines.append("| " + " | ".join([kind, variant, *timed, difference, *space]) + " |")
    lines += ["", f"Answers: {BATCHES['image']} images, {NEW_TOKENS} tokens each.", ""]
    lines += ["| variant | s | tokens/s | ratio |", "|---|---:|---:|---:|"]
    tokens = BATCHES["image"] * NEW_TOKENS
    for variant, taken in result.answers.items():
        ratio = result.answers["plain"] / taken
        lines.append(f"| {variant} | {taken:.2f} | {tokens / taken:.1f} | {ratio:.2f} |")
    lines += ["", "Where a plain step's time goes:", "", "| part | " + " | ".join(result.parts) + " |"]
    lines.append("|---|" + "---:|" * len(result.parts))
    for part in next(iter(result.parts.values())):
        shares = [own[part] / math.fsum(own.values()) for own in result.parts.values()]
        lines.append(f"| {part} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    fp32, bf16 = result.products["fp32"], result.products["bf16"]
    lines += [
        "",
        f"Matrix products on this core: {fp32:.1f} GFLOP/s in fp32, {bf16:.1f} in bf16, a ratio of {bf16 / fp32:.2f}.",
    ]
    measured = {variant for seconds in result.seconds.values() for variant in seconds}
    if left_out := [variant for variant in VARIANTS if variant not in measured]:
        lines += ["", "No time was measured of " + ", ".join(f"`{variant}`" for variant in left_out) + "."]
    if bf16 < fp32:
        lines[-1] += (
            f" This core computes bf16 {fp32 / bf16:.1f} times slower than fp32: weights are held in bf16 and multiply "
            "in fp32."
        )
    return "\n".join(lines) + "\n"


def _cpu() -> str:
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in cpu if line.startswith("model name")), platform.machine())
    flags = next((line.split(":")[1].split() for line in cpu if line.startswith("flags")), [])
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name}, {', '.join(units) or 'no vector units known here'}"


def _quoted(variants: list[str]) -> str:
    return " ".join(f'"{variant}"' if "," in variant else variant for variant in variants)


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each variant")
    parser.add_argument("--kinds", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--memory-only",
        nargs="+",
        default=[],
        choices=VARIANTS,
        help="further variants, of which only memory is measured",
    )
    parser.add_argument("--write", type=Path, help="file for the tables")
    parser.add_argument("--memory-of", nargs=2, metavar=("VARIANT", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_of(*arguments.memory_of))
        return
    torch.set_num_threads(1)
    variants = [variant for variant in VARIANTS if variant == "plain" or variant in arguments.variants]
    only = [variant for variant in arguments.memory_only if variant not in variants]
    options = [f"--rounds {arguments.rounds}"]
    options += ["--variants " + _quoted(variants)] if len(variants) < len(VARIANTS) else []
    options += ["--memory-only " + _quoted(only)] if only else []
    tell(report(measure(arguments.rounds, arguments.kinds, variants, only), options), arguments.write)


if __name__ == "__main__":
    main()
