"""Weight files in each known layout, right and wrong ones."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import state_dicts
from lavis_chatbridge.models.encoders import build_audio, build_vision
from lavis_chatbridge.models.encoders.beats import Beats, BeatsConfig
from lavis_chatbridge.models.encoders.eva import EvaVit
from lavis_chatbridge.models.settings import AudioSettings, VisionSettings
from tests.models.building import SMALL_BEATS, small_model, small_settings

SIZES: dict[str, Any] = {"image_size": 28, "patch_size": 14, "width": 32, "depth": 2, "heads": 4}


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


def changed(model: Any) -> dict[str, Tensor]:
    return {name: t + 1.0 for name, t in model.trainable_state_dict().items()}


def same(model: Any, tensors: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[name], t) for name, t in tensors.items())


@pytest.mark.parametrize("layout", ["folder", "under model", "whole"])
def test_a_trained_bridge_in_every_layout(tmp_path: Path, layout: str) -> None:
    model = small_model()
    tensors, path = changed(model), tmp_path / "model.pth"
    if layout == "folder":
        path = tmp_path
        state_dicts.save(path / "model.safetensors", tensors)
    elif layout == "under model":
        module = {f"module.{name}": t for name, t in tensors.items()}  # of DistributedDataParallel
        torch.save({"model": module, "optimizer": {"lr": 1.0}, "config": {"a": [1]}}, path)
    else:
        constants = ["llama_model.model.layers.0.self_attn.rotary_emb.inv_freq", "Qformer.cls.predictions.bias"]
        constants += ["Qformer.bert.embeddings.word_embeddings.w", "Qformer.bert.encoder.layer.0.output.dense.w"]
        tensors = {name: t + 1 for name, t in model.state_dict().items()}
        torch.save({**tensors, **{name: torch.ones(4) for name in constants}}, path)
        tensors.pop("Qformer.bert.embeddings.position_ids")
    assert not same(model, tensors)
    model.load_checkpoint(str(path))
    assert same(model, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama_proj.bias": None}, "missing: llama_proj.bias"),
        ({"llama_proj.bias": torch.ones(3)}, r"llama_proj.bias is \[3\], expected \[32\]"),
        ({"llama_proj.bias": torch.full((32,), float("nan"))}, "NaN or infinity in llama_proj.bias"),
        ({"ln_vision.weight": torch.ones(32)}, r"missing: ln_vision\.bias$"),
        ({"other.weight": torch.ones(2)}, "unexpected: other.weight"),
    ],
)
def test_a_misfit_is_named_in_one_line_and_loads_nothing(model: Any, tmp_path: Path, change: Any, message: str) -> None:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tensors = {name: t for name, t in (changed(model) | change).items() if t is not None}
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        model.load_checkpoint(str(tmp_path / "a.pth"))
    assert "\n" not in str(caught.value)
    assert same(model, before)


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavis_chatbridge.models.settings.slow_on_cpu", lambda dtype: False)
    tensors = EvaVit(VisionSettings(**SIZES)).state_dict()
    tensors["patch_embed.proj.bias"] += 1e6
    torch.save(tensors, tmp_path / "eva.pth")
    settings = {"weights": str(tmp_path / "eva.pth"), **SIZES}
    with pytest.raises(CheckpointError, match=r"in torch\.float16: NaN or infinity in patch_embed\.proj\.bias"):
        build_vision(VisionSettings(dtype="float16", **settings))
    assert build_vision(VisionSettings(dtype="bfloat16", **settings)).cls_token.dtype == torch.bfloat16  # type: ignore[attr-defined]


def test_blip2_gives_queries_perceiver_and_norm(tmp_path: Path) -> None:
    source = small_model(seed=1)
    wanted = {n: t + 1 for n, t in source.state_dict().items() if n.startswith(("Qformer.", "ln_vision."))}
    queries = source.image_query_tokens.detach()
    text = {"Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.ones(2), "t5_proj.weight": torch.ones(2)}
    torch.save({"model": {**wanted, "query_tokens": queries, **text}}, tmp_path / "blip2.pth")
    own = small_settings().perceiver.model_copy(update={"weights": str(tmp_path / "blip2.pth")})
    model = small_model(perceiver=own)
    wanted.pop("Qformer.bert.embeddings.position_ids")
    assert same(model, {**wanted, "image_query_tokens": queries})
    torch.save({"model": {**wanted, "query_tokens": queries[:, :2]}}, tmp_path / "blip2.pth")
    with pytest.raises(CheckpointError, match=r"image_query_tokens is \[1, 2, 32\], expected \[1, 3, 32\]"):
        small_model(perceiver=own)


def test_eva_drops_the_last_block_and_fits_positions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    large = EvaVit(VisionSettings(**SIZES | {"image_size": 56, "depth": 3}))
    torch.save({**large.state_dict(), "norm.weight": torch.ones(32)}, tmp_path / "eva.pth")
    vision: Any = build_vision(VisionSettings(weights=str(tmp_path / "eva.pth"), **SIZES))
    assert torch.equal(vision.blocks[1].mlp.fc1.weight, large.blocks[1].mlp.fc1.weight)
    assert torch.equal(vision.pos_embed[:, 0], large.pos_embed[:, 0])
    assert vision.pos_embed.shape == (1, 5, 32)
    assert capsys.readouterr().out == ""  # only answers go to stdout
    with pytest.raises(CheckpointError, match=r"does not fit model\.vision: unexpected: blocks\.2\."):
        build_vision(VisionSettings(weights=str(tmp_path / "eva.pth"), **SIZES | {"depth": 1}))


def test_beats_brings_its_own_sizes(tmp_path: Path) -> None:
    cfg = SMALL_BEATS.model_dump() | {"encoder_layers": 3, "dropout": 0.1, "layer_norm_first": False}
    held = Beats(BeatsConfig.from_dict(cfg))
    once = {n: t for n, t in held.state_dict().items() if "relative" not in n or ".layers.0." in n}
    torch.save({"cfg": cfg, "model": {**once, "predictor.weight": torch.ones(2)}}, tmp_path / "b.pt")
    beats: Any = build_audio(AudioSettings(weights=str(tmp_path / "b.pt")))
    assert same(beats, held.state_dict())


class _Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_runs_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    """In torch's formats since 1.6 and before."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Evil()}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refused.*never code"):
        state_dicts.read(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


def test_damaged_and_foreign_files_are_one_line(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(200, 7)}
    torch.save(tensors, tmp_path / "whole.pth")
    state_dicts.save(tmp_path / "whole.safetensors", tensors)
    for suffix in (".pth", ".safetensors"):
        data = (tmp_path / f"whole{suffix}").read_bytes()
        cuts = [b"junk" + data, *(data[:size] for size in (0, 8, 60, len(data) // 2, len(data) - 1))]
        for content in (*cuts, b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1"):
            (tmp_path / f"cut{suffix}").write_bytes(content)
            with pytest.raises(CheckpointError, match=f"cut{suffix} ") as caught:
                state_dicts.read(tmp_path / f"cut{suffix}")
            assert not re.search(r"\n|mmap|refused", str(caught.value))
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="contains epoch, expected tensors by name"):
        state_dicts.read(tmp_path / "other.pth")


def test_a_saved_file_has_shared_tensors_and_a_configuration(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state_dicts.save(tmp_path / "a.safetensors", {"a": shared, "b": shared.view(2, 3).t()}, cfg={"x": 1})
    file = state_dicts.read(tmp_path / "a.safetensors")
    assert file.cfg == {"x": 1}
    assert torch.equal(file.tensors["b"], shared.view(2, 3).t())


def test_the_hash_depends_on_values_names_shapes_types_and_more() -> None:
    a = torch.arange(6.0)
    assert state_dicts.hash_of({"a": a, "b": a}) == state_dicts.hash_of({"b": a, "a": a.clone()})
    others = ({"a": a}, {"a": a + 1}, {"c": a}, {"a": a.view(2, 3)}, {"a": a.half()})
    assert len({state_dicts.hash_of({"a": a}, 1), *map(state_dicts.hash_of, others)}) == 6


def test_blip2_in_huggingface_layout_gives_the_features_of_lavis_layout(tmp_path: Path) -> None:
    """BLIP-2 as `Salesforce/blip2-*` publish it: shards, of which only those with the wanted parts are read."""
    from transformers import Blip2Config, Blip2Model

    torch.manual_seed(0)
    part = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {"model_type": "opt", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 32}
    config = Blip2Config(
        vision_config={**part, "image_size": 28, "patch_size": 14},
        qformer_config={**part, "vocab_size": 10, "encoder_hidden_size": 32, "cross_attention_frequency": 2},
        text_config={**text, "num_attention_heads": 4, "word_embed_proj_dim": 32},
        num_query_tokens=3,
    )
    reference: Any = Blip2Model(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    vision = VisionSettings(weights=str(tmp_path), **SIZES | {"mlp_ratio": 1.5})
    perceiver = small_settings().perceiver.model_copy(update={"weights": str(tmp_path)})
    model = small_model(vision=vision, perceiver=perceiver)
    image = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = reference.vision_model.encoder(inputs_embeds=reference.vision_model.embeddings(image))[0]
        found = model.visual_encoder.encode(image)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        seen = {"encoder_hidden_states": model.ln_vision(found)}
        soft = model.Qformer.bert(query_embeds=model.image_query_tokens.expand(2, -1, -1), **seen)
        wanted = reference.qformer(query_embeds=reference.query_tokens.expand(2, -1, -1), **seen)
        torch.testing.assert_close(soft.last_hidden_state, wanted.last_hidden_state, atol=1e-5, rtol=0)
    assert torch.equal(model.ln_vision.weight, reference.vision_model.post_layernorm.weight)
