"""One training step on one CPU core, against a plain reference and against the core's own ceiling.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--rounds 5] [--write benchmarks/step.md]

Sizes: EVA-ViT of 12 layers x 384 (224-pixel images), BEATs 6 x 384 (clips of 10 s), perceiver 6 x 384 with 32 queries,
LLaMA 12 x 512 with a vocabulary of 32,000; random weights, no dropout. Batches: 8 images, 4 videos of 4 frames, 8
sounds of 2 clips, each with a caption of 6 to 20 words. Two steps are timed together: plain takes their samples in
order, ours in batches of similar lengths, by the training's own plan (`run.group_by_length`, here over 2 batches).

The plain reference works as the original's code does: one frame or clip after the other, attention of two matmuls and
a softmax, logits of every position, AdamW by parameter. Weights, samples and the perceiver (LAVIS's) are the same.
"ours" is the package's `TrainStep`, "cached" reads encoded media. Medians of processor time, in turns.

The ceiling is the best rate of a square fp32 matmul on the same core; a step's share of it is its floating-point
operations (`torch.utils.flop_counter`) divided by its seconds and the ceiling.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from common import Trainer, circumstances, command_line, write_table
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lavis_chatbridge.datasets.plan import MixturePlan
from lavis_chatbridge.media.source import AudioClips, EncodedMedium
from lavis_chatbridge.models import layout
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.models.encoders.beats import BeatsConfig, relative_buckets
from lavis_chatbridge.models.encoding import perceive
from lavis_chatbridge.models.settings import (
    AudioSettings,
    LanguageModelSettings,
    ModelSettings,
    PerceiverSettings,
    VisionSettings,
)
from lavis_chatbridge.prompting.conversation import Slot, alignment_prompt

BATCHES = {"image": 8, "video": 4, "audio": 8}
STEPS = 2
FRAMES, CLIPS, CLIP, MEL_BINS = 4, 2, 1024, 64
BEATS = BeatsConfig(encoder_layers=6, encoder_embed_dim=384, encoder_ffn_embed_dim=1536, encoder_attention_heads=6)
LLAMA = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1376,
    "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 2048,
}  # fmt: skip
GOALS = {"image": 1.2, "video": 1.05, "audio": 1.2}
SHARE = 0.75
WORDS = ("a", "red", "circle", "moves", "left", "blue", "square", "green", "star", "above", "two", "big", "small")


def build() -> ChatBridge:
    """The model of the middle size."""
    torch.manual_seed(0)
    settings = ModelSettings(
        language_model=LanguageModelSettings(tokenizer="package:assets/tiny/llm", config=LLAMA),
        vision=VisionSettings(width=384, depth=12, heads=6, mlp_ratio=4.0),
        audio=AudioSettings(config=BEATS.model_dump(), mask_padding=False),
        perceiver=PerceiverSettings(width=384, layers=6, heads=6, feed_forward=1536, dropout=0.0),
    )
    return ChatBridge(settings).train()


def batches_of(modality: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same samples twice: in batches as they are drawn, and in the training plan's batches of similar lengths."""
    size = BATCHES[modality]
    media, captions = media_of(modality, STEPS * size), captions_of(STEPS * size)
    lengths = np.array([len(caption.split()) for caption in captions])
    plan = MixturePlan({modality: len(captions)}, batch_size=size, lengths={modality: lengths}, group=STEPS)
    grouped = [[index for index, _ in plan.batch(step)[1]] for step in range(STEPS)]
    drawn = np.arange(len(captions)).reshape(STEPS, size).tolist()
    return tuple([_batch(modality, media, captions, rows) for rows in order] for order in (drawn, grouped))  # type: ignore[return-value]


def media_of(modality: str, count: int) -> list[Any]:
    """Random media."""
    rng = torch.Generator().manual_seed(1)
    if modality == "audio":
        frames = torch.full((CLIPS,), CLIP)
        return [AudioClips(torch.randn(CLIPS, CLIP, MEL_BINS, generator=rng), frames) for _ in range(count)]
    shape = (3, 224, 224) if modality == "image" else (FRAMES, 3, 224, 224)
    return [torch.randn(*shape, generator=rng) for _ in range(count)]


def captions_of(count: int) -> list[str]:
    """Captions whose lengths differ as those of real ones do."""
    words = np.random.default_rng(2)
    return [" ".join(words.choice(WORDS, words.integers(6, 21))) for _ in range(count)]


def _batch(modality: str, media: list[Any], captions: list[str], rows: list[int]) -> dict[str, Any]:
    pieces = [alignment_prompt((modality,), captions[row]) for row in rows]  # type: ignore[arg-type]
    others: dict[str, Any] = {other: [[]] * len(rows) for other in BATCHES if other != modality}
    return {
        "sample_id": [str(row) for row in rows],
        "pieces": pieces,
        modality: [[media[row]] for row in rows],
        **others,
    }


def cached(model: ChatBridge, batch: dict[str, Any], modality: str) -> dict[str, Any]:
    """The batch as a feature cache gives it."""
    encoded = model.encode_media(modality, [media[0] for media in batch[modality]])  # type: ignore[arg-type]
    stored = [[EncodedMedium(medium.tokens.half(), medium.mask)] for medium in encoded]
    return {**batch, modality: stored}


class Plain:
    """The reference: the model's weights, worked as the original's code works them."""

    def __init__(self) -> None:
        self.model = build()
        for block in self.model.visual_encoder.blocks:
            del block.attn.forward  # LAVIS's own attention
        self.model.llama_model.set_attn_implementation("eager")
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, foreach=False, fused=False)

    def step(self, batch: dict[str, Any], modality: str) -> float:
        """One training step."""
        loss = self.loss(batch, modality)
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def loss(self, batch: dict[str, Any], modality: str) -> Tensor:
        """The loss, from logits at every position."""
        model = self.model
        embeds, laid = self.embeds(batch, modality)
        out = model.llama_model(
            inputs_embeds=embeds, attention_mask=laid.attention_mask, return_dict=True, use_cache=False
        )
        logits = out.logits.float()
        shifted, labels = logits[:, :-1].contiguous(), laid.labels[:, 1:].contiguous()
        return functional.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels.view(-1))

    def embeds(self, batch: dict[str, Any], modality: str) -> tuple[Tensor, Any]:
        """The padded rows of a batch, with soft tokens of media encoded frame by frame or clip by clip."""
        model = self.model
        media = [medium[0] for medium in batch[modality]]
        tokens = self.hear(media) if modality == "audio" else self.see(media)
        queries = model.audio_query_tokens if modality == "audio" else model.image_query_tokens
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        soft = model.llama_proj(perceive(model.Qformer, queries, tokens, mask))
        count = soft.shape[1]
        places: list[Any] = [{Slot(modality): range(i * count, (i + 1) * count)} for i in range(len(media))]
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


def in_turns(functions: list[Callable[[], Any]], rounds: int) -> list[tuple[float, int]]:
    """Median seconds of processor time of each function, in turns, and its operations, counted in a first call."""
    seconds: list[list[float]] = [[] for _ in functions]
    operations = []
    for function in functions:
        with FlopCounterMode(display=False) as counter:
            function()
        operations.append(counter.get_total_flops())
    for _ in range(rounds):
        for function, own in zip(functions, seconds, strict=True):
            begin = time.process_time()
            function()
            own.append(time.process_time() - begin)
    return [(statistics.median(own), count) for own, count in zip(seconds, operations, strict=True)]


def ceiling() -> float:
    """Floating-point operations a second of this core's fp32 matmul."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return max(operations / seconds for seconds, operations in (in_turns([lambda: a @ b], 5)[0] for _ in range(3)))


def measure(modality: str, rounds: int) -> list[tuple[str, float, float, float]]:
    """Variant, seconds of a step, its share of the ceiling, the difference of its loss to plain's."""
    drawn, grouped = batches_of(modality)
    plain, ours = Plain(), Trainer(build(), "cpu", clip_grad_norm=None, decay_all=True)
    stored = [cached(ours.model, batch, modality) for batch in grouped]
    work: dict[str, tuple[Any, list[dict[str, Any]]]] = {"plain": (plain, drawn), "ours": (ours, grouped)}
    work["ours, cached"] = (ours, stored)
    with torch.no_grad():
        expected = float(torch.stack([plain.loss(batch, modality) for batch in drawn]).mean())
        found = float(torch.stack([ours.loss(ours.model, batch)[0] for batch in drawn]).mean())
        from_cache = float(
            torch.stack([ours.loss(ours.model, cached(ours.model, b, modality))[0] for b in drawn]).mean()
        )
    apart = {"plain": 0.0, "ours": found - expected, "ours, cached": from_cache - expected}
    functions = [lambda s=s, bs=bs: [s.step(batch, modality) for batch in bs] for s, bs in work.values()]  # type: ignore[misc]
    top, rows = ceiling(), []
    for name, (seconds, operations) in zip(work, in_turns(functions, rounds), strict=True):
        rows.append((name, seconds / STEPS, operations / seconds / top, apart[name]))
        print(modality, *rows[-1], file=sys.stderr, flush=True)
    return rows


def report(rounds: int) -> str:
    """The table in Markdown."""
    how = circumstances("step.py", f"--rounds {rounds}", modules=(torch, transformers))
    lines = ["# A training step on one CPU core", "", how]
    lines.append(f"One thread, fp32. The core's matmul ceiling is {ceiling() / 1e9:.0f} GFLOP/s.")
    lines += [
        "",
        "| modality | variant | s/step | ratio to plain | goal | share of the ceiling | goal | loss - plain |",
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for modality in BATCHES:
        rows = measure(modality, rounds)
        for name, seconds, share, apart in rows:
            goal, top = (GOALS[modality], SHARE) if name == "ours" else ("", "")
            lines.append(
                f"| {modality} | {name} | {seconds:.2f} | {rows[0][1] / seconds:.2f} | {goal} | {share:.2f} | {top} "
                f"| {apart:+.1e} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each variant")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_table(report(arguments.rounds), arguments.write)


if __name__ == "__main__":
    main()
