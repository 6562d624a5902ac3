"""Encoders and perceiver from files: nothing is drawn or built twice for what a file holds, no number differs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lavis_chatbridge.models import building, checkpoint
from lavis_chatbridge.models.beats import Beats
from lavis_chatbridge.models.language_model import load_language_model
from lavis_chatbridge.models.perceiver import build_perceiver
from lavis_chatbridge.models.settings import AudioSettings, ModelSettings, VisionSettings
from lavis_chatbridge.models.shapes import vision_shapes
from lavis_chatbridge.models.vision import build_vision
from tests.models.building import SMALL_BEATS, small_model, small_settings

VISION = VisionSettings(image_size=28, patch_size=14, width=32, depth=2, heads=4)


@contextmanager
def nothing_drawn() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def eva_file(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As published: a block and a norm too many, and positions of larger images."""
    torch.manual_seed(1)
    tensors = build_vision(replace(VISION, depth=3, image_size=56)).state_dict()
    tensors = {name: torch.randn(t.shape).to(dtype) for name, t in tensors.items()}
    torch.save({**tensors, "norm.weight": torch.ones(32)}, path)
    return path


def beats_file(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(2)
    tensors = {name: t.to(dtype) for name, t in Beats(SMALL_BEATS).state_dict().items()}
    torch.save({"cfg": vars(SMALL_BEATS), "model": {**tensors, "predictor.weight": torch.ones(2)}}, path)
    return path


def blip2_file(path: Path, settings: ModelSettings) -> Path:
    torch.manual_seed(3)
    own = settings.perceiver
    perceiver = {f"Qformer.{name}": t for name, t in build_perceiver(own, 32).state_dict().items()}
    norm = {"ln_vision.weight": torch.randn(32), "ln_vision.bias": torch.randn(32)}
    torch.save({"model": {"query_tokens": torch.randn(1, own.queries, own.width), **perceiver, **norm}}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, golden_dir: Path) -> dict[str, Any]:
    """Settings that name a file for each part."""
    folder = tmp_path_factory.mktemp("files")
    settings = small_settings(golden_dir / "tokenizer")
    blip2 = blip2_file(folder / "blip2.pth", settings)
    return {
        "vision": replace(settings.vision, weights=str(eva_file(folder / "eva.pth")), dtype="bfloat16"),
        "audio": AudioSettings(weights=str(beats_file(folder / "beats.pt")), dtype="bfloat16"),
        "perceiver": replace(settings.perceiver, weights=str(blip2)),
    }


def same(module: nn.Module, expected: nn.Module) -> None:
    found, wanted = module.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].is_contiguous()
        assert torch.equal(found[name], tensor), name
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in expected.parameters()]


@pytest.mark.parametrize("held", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_encoders_of_files_are_those_of_the_plain_way(tmp_path: Path, held: torch.dtype, dtype: Any) -> None:
    eva, beats = eva_file(tmp_path / "eva.pth", held), beats_file(tmp_path / "beats.pt", held)
    plain = build_vision(VISION)
    plain.load_state_dict(checkpoint.vision_tensors(torch.load(eva), VISION.depth, VISION.tokens))
    same(building.vision_encoder(replace(VISION, weights=str(eva), dtype=dtype)), plain.to(getattr(torch, dtype)))
    heard = Beats(SMALL_BEATS)
    heard.load_state_dict(checkpoint.beats_tensors(torch.load(beats)["model"], SMALL_BEATS.encoder_layers))
    encoder = building.audio_encoder(AudioSettings(weights=str(beats), dtype=dtype))
    same(encoder, heard.to(getattr(torch, dtype)))
    tables = {id(layer.self_attn.relative_attention_bias.weight) for layer in encoder.encoder.layers}
    assert len(tables) == 1, "the relative positions are one table for all layers"


def test_nothing_is_drawn_or_reserved_for_what_a_file_holds(files: dict[str, Any]) -> None:
    with nothing_drawn():
        vision, audio = building.vision_encoder(files["vision"]), building.audio_encoder(files["audio"])
        perceiver = building.perceiver(files["perceiver"], 32)
    assert not any(t.is_meta for module in (vision, audio) for t in (*module.parameters(), *module.buffers()))
    assert all(p.is_meta for p in perceiver.parameters()), "BLIP-2's file fills it"
    assert torch.equal(perceiver.bert.embeddings.position_ids, torch.arange(512).unsqueeze(0))
    with pytest.raises(AssertionError), nothing_drawn():
        building.vision_encoder(VISION)


def test_the_whole_model_of_files_works_and_trains(golden_dir: Path, files: dict[str, Any]) -> None:
    model = small_model(golden_dir / "tokenizer", **files)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert not [name for name, tensor in tensors.items() if tensor.is_meta]
    assert {t.dtype for n, t in model.named_parameters() if n.startswith(("Qformer.", "ln_"))} == {torch.float32}
    encoders = (model.visual_encoder, model.audio_encoder)
    assert {p.dtype for encoder in encoders for p in encoder.parameters()} == {torch.bfloat16}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    fresh = small_model(golden_dir / "tokenizer")
    assert trained == {name for name, p in fresh.named_parameters() if p.requires_grad}
    loss = model({"image": torch.randn(2, 3, 28, 28), "text_input": ["a red ball", "a dog"]})["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for n, p in model.Qformer.named_parameters() if "crossattention" in n)


def test_what_is_trained_does_not_lie_in_its_file(golden_dir: Path, files: dict[str, Any], tmp_path: Path) -> None:
    path = blip2_file(tmp_path / "blip2.pth", small_settings(golden_dir / "tokenizer"))
    settings = {**files, "perceiver": replace(files["perceiver"], weights=str(path))}
    model = small_model(golden_dir / "tokenizer", **settings)
    before = model.trainable_state_dict()
    with open(path, "r+b") as opened:
        opened.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trainable_state_dict().items())


def test_random_parts_are_drawn_in_the_order_of_the_model(golden_dir: Path) -> None:
    settings = small_settings(golden_dir / "tokenizer")
    model = small_model(golden_dir / "tokenizer", seed=5)
    torch.manual_seed(5)
    load_language_model(settings.language_model)
    vision, audio = build_vision(settings.vision), Beats(SMALL_BEATS)
    audio_trans, perceiver = nn.Linear(32, 32), build_perceiver(settings.perceiver, 32)
    queries = torch.randn(1, 3, 32) * settings.perceiver.initializer_range
    for found, drawn in (
        (model.visual_encoder, vision),
        (model.audio_encoder, audio),
        (model.audio_trans, audio_trans),
        (model.Qformer, perceiver),
    ):
        assert all(torch.equal(t, drawn.state_dict()[name]) for name, t in found.state_dict().items())
    assert torch.equal(model.image_query_tokens, queries)


def test_random_parts_beside_files_follow_the_seed(golden_dir: Path, files: dict[str, Any]) -> None:
    first, again, other = (small_model(golden_dir / "tokenizer", seed=seed, **files) for seed in (7, 7, 8))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in first.state_dict().items())
    assert not torch.equal(first.llama_proj.weight, other.llama_proj.weight)
    assert torch.equal(first.image_query_tokens, other.image_query_tokens)
    same(first.Qformer, other.Qformer)


PROBE = """
import json, sys, threading
from pathlib import Path
from lavis.models.eva_vit import VisionTransformer
from lavis_chatbridge.models import building
from lavis_chatbridge.models.settings import VisionSettings

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))

def watch():
    global peak
    while not ended.wait(0.001):
        peak = max(peak, own())

settings, ended = VisionSettings(**json.loads(sys.argv[1])), threading.Event()
before = peak = own()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
encoder = building.vision_encoder(settings)
peak = max(peak, own())
ended.set()
watcher.join()
print(json.dumps([peak - before, sum(p.numel() * p.element_size() for p in encoder.parameters())]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_memory_for_an_encoder_is_its_size_in_its_precision(tmp_path: Path) -> None:
    """Built in float32 before its file is read it would take twice its size, and up to three times when converted."""
    sizes = {"image_size": 28, "patch_size": 14, "width": 512, "depth": 8, "heads": 4, "mlp_ratio": 4.0}
    path = tmp_path / "eva.pth"
    shapes = vision_shapes(VisionSettings(**sizes))  # type: ignore[arg-type]
    torch.save({name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}, path)
    settings = json.dumps({**sizes, "weights": str(path), "dtype": "bfloat16"})
    done = subprocess.run([sys.executable, "-c", PROBE, settings], check=True, capture_output=True, text=True)
    peak, size = json.loads(done.stdout.splitlines()[-1])
    assert size > 48 << 20
    assert 0.5 * size < peak < 1.5 * size
