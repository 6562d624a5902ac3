"""The shipped tiny encoders see and hear: a linear probe on the mean of their tokens reads every attribute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import lavis_chatbridge
from lavis_chatbridge.models.beats import Beats
from lavis_chatbridge.models.vision import build_vision
from lavis_chatbridge.toyworld import pools
from lavis_chatbridge.toyworld.pretrain_encoders import (
    BEATS,
    FILES,
    RECIPES,
    VISION,
    Heads,
    fit,
    loss_of,
    save,
    spread_weights,
)

ASSETS = Path(lavis_chatbridge.__file__).parent / "assets" / "tiny"
TESTED = 64


def shipped(name: str, module: nn.Module) -> nn.Module:
    module.load_state_dict(load_file(ASSETS / FILES[name]))
    return module.eval()


def probe(features: Tensor, labels: Tensor) -> list[float]:
    """Accuracy per attribute on the last `TESTED` of a ridge regression that is fitted to the others."""
    features = functional.layer_norm(features, features.shape[-1:])
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    right = []
    for column in labels.unbind(1):
        known = column != pools.UNKNOWN
        train, test = known.clone(), known.clone()
        train[-TESTED:], test[:-TESTED] = False, False
        if not test.any():
            continue
        x, y = features[train], functional.one_hot(column[train]).double()
        weights = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
        right.append(((features[test] @ weights).argmax(1) == column[test]).double().mean().item())
    return right


@torch.no_grad()
def test_the_vision_encoder_sees_every_attribute() -> None:
    encoder = shipped("vision", build_vision(VISION))
    stills = pools.render_stills(720, VISION.image_size, seed=77)
    features = functional.layer_norm(encoder(stills.pixels.float()), (VISION.width,)).mean(1)
    order = torch.randperm(360, generator=torch.Generator().manual_seed(0))
    assert min(probe(features[:360][order], stills.labels[:360][order])) >= 0.95
    assert min(probe(features[360:][order], stills.labels[360:][order])) >= 0.95


@torch.no_grad()
def test_the_audio_encoder_hears_every_attribute() -> None:
    encoder = shipped("audio", Beats(BEATS))
    sounds = pools.render_sounds(220, seed=78)
    features = []
    for start in range(0, 220, 20):
        some = range(start, start + 20)
        tokens, mask = encoder(*pools.sound_batch([sounds.fbanks[i][:512] for i in some], sounds, some).inputs)
        heard = functional.layer_norm(tokens, tokens.shape[-1:]) * mask.unsqueeze(-1)
        features.append(heard.sum(1) / mask.sum(1, keepdim=True))
    assert min(probe(torch.cat(features), sounds.labels)) >= 0.95


def test_the_assets_are_small() -> None:
    assert sum((ASSETS / file).stat().st_size for file in FILES.values()) <= 2_000_000


def test_mirrored_stills_have_mirrored_places() -> None:
    pool = pools.render_stills(20, VISION.image_size, seed=0)
    batch = next(pools.still_batches(pool, 256, seed=0))
    assert batch.inputs[0].shape == (256, 3, 56, 56)
    place = batch.labels[:, pools.STILL_ATTRIBUTES.index("place")]
    assert batch.targets.dtype == batch.inputs[0].dtype == torch.float32  # torch 2.8 has no way back from two
    x = batch.targets[:, 0]
    assert (x[place == 0] < -0.3).all()  # left
    assert (x[place == 1] > 0.3).all()  # right
    assert set(place.unique().tolist()) <= {-1, 0, 1, 2, 3, 4}


def test_sound_batches_are_cut_and_masked() -> None:
    pool = pools.render_sounds(6, seed=0)
    batches = pools.sound_batches(pool, seed=0)
    for batch, _ in zip(batches, range(5), strict=False):
        fbank, frames = batch.inputs
        assert fbank.shape[1] == frames.max() <= 1024
        assert (fbank[torch.arange(fbank.shape[1]) >= frames[:, None]] == 0).all()
        assert batch.labels.shape == (len(frames), 3)


def test_training_lowers_the_loss_and_saves_what_the_model_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_vision(VISION)
    spread_weights(encoder)
    heads = Heads(VISION.width, [6, 8, 2, 5], targets=3)
    batches = pools.still_batches(pools.render_stills(24, VISION.image_size, seed=1), 24, seed=1)

    def encode(batch: pools.Batch) -> tuple[Tensor, Tensor]:
        tokens = encoder(batch.inputs[0])
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)

    first = loss_of(heads(*encode(batch := next(batches))), batch).item()
    recipe = type(RECIPES["vision"])(renderings=24, steps=40, warmup=5)
    fit(nn.ModuleList([encoder, heads]), encode, heads, batches, recipe, score=lambda: "")
    assert loss_of(heads(*encode(batch)), batch).item() < 0.5 * first
    save(encoder, tmp_path / "eva_vit.safetensors")
    saved = load_file(tmp_path / "eva_vit.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    assert encoder.load_state_dict(saved)


def test_an_attribute_that_nobody_knows_costs_nothing() -> None:
    labels = torch.full((3, 1), pools.UNKNOWN)
    batch = pools.Batch((), labels, torch.zeros(3, 0))
    assert loss_of([torch.randn(3, 4), torch.zeros(3, 0)], batch).item() == pytest.approx(0.0)
