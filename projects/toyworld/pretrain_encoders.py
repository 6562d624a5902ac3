"""Trains the tiny EVA-ViT and the tiny BEATs of the embedded world as classifiers of its attributes.

``python projects/toyworld/pretrain_encoders.py vision --out FOLDER`` writes ``eva_vit.safetensors`` or
``beats.safetensors``: the encoder's state dict in fp16, without its classification heads.

Shape legend: ``B`` batch, ``N`` tokens, ``D`` width, ``A`` attributes.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pools
import torch
from pools import Batch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge.files import atomic_file
from lavis_chatbridge.models.encoders.beats import Beats, BeatsConfig
from lavis_chatbridge.models.encoders.eva import EvaVit
from lavis_chatbridge.models.weights import model_settings
from lavis_chatbridge.toyworld.world import ATTRIBUTES

log = logging.getLogger(__name__)

TINY = model_settings("tiny")
VISION = TINY.vision
BEATS = BeatsConfig(**TINY.audio.config)
UNSEEN = 960
"""Number of renderings that are used only for scoring."""

TARGET_WEIGHT = 4.0
"""Loss weight of the squared error of position and radius; cross-entropies have weight 1."""

Encode = Callable[[Batch], tuple[Tensor, Tensor]]
"""Batch -> tokens ``[B, N, D]`` and their mask ``[B, N]``."""


@dataclass(frozen=True)
class Recipe:
    """Number of renderings, and training settings of an encoder."""

    renderings: int
    steps: int
    rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.02
    seed: int = 0


RECIPES = {"vision": Recipe(renderings=30_000, steps=8000), "audio": Recipe(renderings=5000, steps=1500)}
FILES = {"vision": "eva_vit.safetensors", "audio": "beats.safetensors"}


class Heads(nn.Module):
    """A linear classifier per attribute, and a linear regression, on the mean of the tokens.

    Because of the mean, each token learns to represent the attributes, for the perceiver.
    """

    def __init__(self, width: int, classes: Sequence[int], targets: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sizes = [*classes, targets]
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """``[B, N, D]`` tokens and ``[B, N]`` mask -> ``[B, classes]`` per attribute, and ``[B, targets]``."""
        weights = mask.to(tokens.dtype).unsqueeze(-1)
        mean = (self.norm(tokens) * weights).sum(1) / weights.sum(1)
        return list(self.linear(mean).split(self.sizes, dim=-1))


def train_vision(recipe: Recipe) -> nn.Module:
    """A trained tiny EVA-ViT; logs its accuracy on new renderings."""
    torch.manual_seed(recipe.seed)
    encoder = EvaVit(VISION)
    initialise(encoder)
    names = pools.STILL_ATTRIBUTES
    heads = Heads(VISION.width, [len(ATTRIBUTES["image"][name]) for name in names], targets=3)
    began = time.monotonic()
    pool = pools.render_stills(recipe.renderings, VISION.image_size, recipe.seed)
    unseen = pools.render_stills(UNSEEN, VISION.image_size, recipe.seed + 1)
    log.info("rendered %d stills in %.0f s", len(pool.labels), time.monotonic() - began)

    def encode(batch: Batch) -> tuple[Tensor, Tensor]:
        tokens = encoder(batch.inputs[0])
        return tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool)

    def score() -> str:
        half = len(unseen.labels) - len(unseen.labels) // 2
        parts = []
        for name, part in (("pictures", slice(0, half)), ("frames of clips", slice(half, None))):
            targets = pools.still_targets(unseen.places[part])
            right = accuracy(encode, heads, [Batch((unseen.pixels[part].float(),), unseen.labels[part], targets)])
            parts.append(f"{name}: {_listed(names, right)}")
        return "; ".join(parts)

    fit(nn.ModuleList([encoder, heads]), encode, heads, pools.still_batches(pool, 64, recipe.seed), recipe, score)
    return encoder


def train_audio(recipe: Recipe) -> nn.Module:
    """A trained tiny BEATs; logs its accuracy on new renderings."""
    torch.manual_seed(recipe.seed)
    encoder = Beats(BEATS)
    names = pools.SOUND_ATTRIBUTES
    heads = Heads(BEATS.encoder_embed_dim, [len(ATTRIBUTES["audio"][name]) for name in names], targets=0)
    began = time.monotonic()
    pool = pools.render_sounds(recipe.renderings, recipe.seed)
    unseen = pools.render_sounds(UNSEEN // 3, recipe.seed + 1)
    log.info("rendered %d sounds in %.0f s", len(pool.labels), time.monotonic() - began)

    def encode(batch: Batch) -> tuple[Tensor, Tensor]:
        return encoder(*batch.inputs)

    def score() -> str:
        parts = [range(i, min(i + 32, len(unseen.fbanks))) for i in range(0, len(unseen.fbanks), 32)]
        clips = [pools.sound_batch([unseen.fbanks[i][:1024] for i in some], unseen, some) for some in parts]
        return f"sounds: {_listed(names, accuracy(encode, heads, clips))}"

    fit(nn.ModuleList([encoder, heads]), encode, heads, pools.sound_batches(pool, recipe.seed), recipe, score)
    return encoder


def fit(
    module: nn.Module, encode: Encode, heads: Heads, batches: Iterator[Batch], recipe: Recipe, score: Callable[[], str]
) -> None:
    """Train ``module`` (encoder and heads) with AdamW, warm-up and cosine decay; log loss and score at intervals."""
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, recipe))
    began = time.monotonic()
    for step in range(1, recipe.steps + 1):
        batch = next(batches)
        loss = loss_of(heads(*encode(batch)), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            log.info("step %d of %d, loss %.4f, %.0f s", step, recipe.steps, loss.item(), time.monotonic() - began)
        if step % 1000 == 0 or step == recipe.steps:
            log.info("unseen %s", score())


def loss_of(outputs: Sequence[Tensor], batch: Batch) -> Tensor:
    """The sum of the attributes' cross-entropies (without unknown labels) and the weighted error of the targets."""
    *logits, regressed = outputs
    loss = logits[0].new_zeros(())
    for scores, labels in zip(logits, batch.labels.unbind(1), strict=True):
        known = labels != pools.UNKNOWN
        if known.any():
            loss = loss + functional.cross_entropy(scores[known], labels[known])
    if regressed.shape[1]:
        loss = loss + TARGET_WEIGHT * functional.mse_loss(regressed, batch.targets)
    return loss


@torch.no_grad()
def accuracy(encode: Encode, heads: Heads, batches: Sequence[Batch]) -> list[float]:
    """The share of right classifications per attribute, over the media with this attribute; NaN if there are none."""
    right, known = torch.zeros(batches[0].labels.shape[1]), torch.zeros(batches[0].labels.shape[1])
    for batch in batches:
        *logits, _ = heads(*encode(batch))
        guesses = torch.stack([scores.argmax(-1) for scores in logits], dim=1)
        known += (batch.labels != pools.UNKNOWN).sum(0)
        right += (guesses == batch.labels).sum(0)
    return (right / known).tolist()


def initialise(encoder: nn.Module) -> None:
    """Initialise an EVA-ViT's weights with a scale for its width.

    LAVIS uses a standard deviation of 0.02 for all weights, which suits a width of 1408. At a width of 96, the position
    embeddings would be too small compared to the patches, and positions of objects would not be learnt.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    for name, parameter in encoder.named_parameters():
        if name in ("pos_embed", "cls_token"):
            nn.init.normal_(parameter, std=0.3)
        elif name == "patch_embed.proj.weight":
            nn.init.xavier_uniform_(parameter.data.flatten(1))
        elif name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            parameter.data.mul_(0.5)  # so that blocks initially change the residual stream little


def save(encoder: nn.Module, path: Path) -> None:
    """Write the encoder's state dict in fp16."""
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in encoder.state_dict().items()}
    with atomic_file(path) as file:
        save_file(tensors, file)
    log.info("wrote %s, %d bytes", path, path.stat().st_size)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="train a tiny encoder of the embedded world")
    parser.add_argument("encoder", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights")
    for name, number in (("renderings", int), ("steps", int), ("seed", int), ("rate", float)):
        parser.add_argument(f"--{name}", type=number, help="instead of the recipe's")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = {name: getattr(args, name) for name in ("renderings", "steps", "seed", "rate")}
    recipe = dataclasses.replace(RECIPES[args.encoder], **{k: v for k, v in given.items() if v is not None})
    train = train_vision if args.encoder == "vision" else train_audio
    save(train(recipe), args.out / FILES[args.encoder])


def _rate_factor(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _listed(names: Sequence[str], shares: Sequence[float]) -> str:
    return ", ".join(f"{name} {share:.4f}" for name, share in zip(names, shares, strict=True) if not math.isnan(share))


if __name__ == "__main__":
    main()
