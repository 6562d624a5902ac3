"""Every supported architecture inside a bridge: it loads, trains, is cached and hashed; its options; refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.media.source import AudioClips
from lavis_chatbridge.models import encoders
from lavis_chatbridge.models.encoders.beats import Beats
from lavis_chatbridge.models.encoders.eva import EvaVit
from lavis_chatbridge.models.settings import LoraSettings, VisionSettings
from lavis_chatbridge.prompting.conversation import Modality, alignment_prompt
from tests.models.building import SMALL_BEATS, small_model, small_settings
from tests.models.encoders import architectures

ALL = [("vision", name) for name in architectures.VISION] + [("audio", name) for name in architectures.AUDIO]


def extracted(folder: Path, seconds: float = 2.0) -> AudioClips:
    """Two clips of noise, the second half silent, as the folder's extractor gives them."""
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(folder)
    noise = np.random.default_rng(0).standard_normal((2, int(16_000 * seconds))).astype(np.float32)
    features = next(iter(extractor(list(noise), sampling_rate=16_000, return_tensors="pt").values()))
    steps = features.shape[-1] if features.dim() != 4 else features.shape[2]
    return AudioClips(features, torch.tensor([steps, steps // 2]))


def bridge(part: str, name: str, folder: Path, seed: int = 0) -> Any:
    lora = small_settings().language_model.model_copy(update={"lora": LoraSettings(rank=2, dropout=0)})
    return small_model(language_model=lora, **{part: getattr(architectures, part)(name, folder, seed)})


def batch(part: str, model: Any, folder: Path) -> tuple[Modality, dict[str, Any]]:
    modality: Modality = "image" if part == "vision" else "audio"
    medium = extracted(folder) if part == "audio" else torch.randn(model.visual_encoder.frame_shape)
    pieces = alignment_prompt([modality], "a red dog")
    return modality, {modality: [[medium], [medium]], "pieces": [pieces, pieces]}


@pytest.mark.parametrize(("part", "name"), ALL)
def test_a_bridge_with_each_architecture(part: str, name: str, tmp_path: Path) -> None:
    """One row of the table in docs/weights.md, with LoRA."""
    model = bridge(part, name, tmp_path / "a")
    modality, samples = batch(part, model, tmp_path / "a")

    first = model(samples)["loss"].item()
    media = {modality: [model.encode_media(modality, of_sample) for of_sample in samples[modality]]}
    assert model({**samples, **media})["loss"].item() == pytest.approx(first, abs=1e-5)  # from cached features

    found = model.frozen_hash(modality)
    assert found == bridge(part, name, tmp_path / "a2").frozen_hash(modality)
    assert found != bridge(part, name, tmp_path / "b", seed=1).frozen_hash(modality)

    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()(samples)["loss"].backward()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    squares = sum(float(parameter.grad.square().sum()) for parameter in trained)
    torch.optim.SGD(trained, lr=1e-3 * first / squares).step()  # lowers a linear loss by a thousandth
    assert model.eval()(samples)["loss"].item() < first
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    learns = ("Qformer.", "llama_proj.", "image_query", "audio_query", "audio_trans.", "visual_temp", "audio_temp")
    assert any(".lora_B." in key for key in changed)
    assert {"llama_proj.weight", "image_query_tokens" if part == "vision" else "audio_query_tokens"} <= changed
    assert not {key for key in changed if not key.startswith(learns) and ".lora_" not in key}


@pytest.mark.parametrize(
    ("name", "options", "tokens"),
    [
        ("clip", {}, 17),
        ("clip", {"class_token": False}, 16),
        ("clip", {"pool": 2}, 5),
        ("dinov2", {"class_token": False, "pool": 4}, 1),
        ("siglip", {"layer": 0}, 16),
        ("timm vit", {"class_token": False, "layer": 0}, 4),
        ("timm efficientnet", {"layer": -2}, 4),
        ("timm convnext", {"layer": -2, "pool": 2}, 1),
    ],
)
def test_options_of_vision(name: str, options: dict[str, Any], tokens: int, tmp_path: Path) -> None:
    settings = architectures.vision(name, tmp_path)
    plain, changed = (encoders.build_vision(s) for s in (settings, settings.model_copy(update=options)))
    frames = torch.randn(2, 3, 32, 32)
    found, mask = changed.eval().encode(frames)  # type: ignore[attr-defined]
    assert found.shape == (2, tokens, changed.width)
    assert mask.all()
    assert (changed.description != plain.description) == bool(options)


def test_evas_fused_attention_equals_that_of_lavis() -> None:
    attention = EvaVit(VisionSettings(image_size=28, width=32, depth=2, heads=4)).blocks[1].attn
    for bias in (attention.q_bias, attention.v_bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(attention(x), type(attention).forward(attention, x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 75, 80])
def test_padding_does_not_change_beats(frames: int) -> None:
    """BEATs' numbers are in test_golden."""
    beats = Beats(SMALL_BEATS).eval()
    fbank = torch.randn(3, 160, 32)
    lengths = torch.tensor([frames, 160, 0])
    tokens, mask = beats(fbank, lengths)
    alone, mask_alone = beats(fbank[:1, :frames], lengths[:1])
    assert mask_alone.all()
    assert mask.sum(1).tolist() == [-(-frames // 16) * 2, 20, 2]  # a clip without sound still has a patch to look at
    torch.testing.assert_close(tokens[0, mask[0]], alone[0], atol=1e-5, rtol=0)
    assert not tokens[0, ~mask[0]].any()
    assert tokens.isfinite().all()


def test_beats_drops_a_rest_of_frames_and_refuses_a_rest_of_bins() -> None:
    beats, fbank = Beats(SMALL_BEATS).eval(), torch.randn(1, 90, 32)
    tokens, mask = beats(fbank)
    assert tokens.shape == (1, 10, 32)
    assert mask.all()
    torch.testing.assert_close(tokens, beats(fbank[:, :80])[0])
    with pytest.raises(ConfigError, match="multiples of 16 and at least 16 frames, found 40 bins and 64 frames"):
        beats(torch.zeros(1, 64, 40))


def test_pooling_averages_neighbours_in_the_grid(tmp_path: Path) -> None:
    settings, frames = architectures.vision("siglip", tmp_path), torch.randn(1, 3, 32, 32)
    both = [encoders.build_vision(settings.model_copy(update={"pool": pool})).encode(frames)[0] for pool in (1, 2)]
    torch.testing.assert_close(both[1][0, 1], both[0].view(4, 4, 32)[:2, 2:].mean((0, 1)))


@pytest.mark.parametrize(
    ("name", "options", "tokens", "valid"),
    [
        ("whisper", {}, 100, 50),
        ("whisper", {"pool": 15}, 7, 4),
        ("wav2vec2", {}, 399, 199),
        ("hubert", {"pool": 4}, 100, 50),
        ("ast", {}, 12, 12),
        ("ast", {"class_token": False, "pool": 2}, 3, 3),
        ("clap", {"pool": 8}, 8, 8),
    ],
)
def test_options_of_audio(name: str, options: dict[str, Any], tokens: int, valid: int, tmp_path: Path) -> None:
    """Encoders of one token after another hide padding; those of a fixed window were trained with it."""
    encoder: Any = encoders.build_audio(architectures.audio(name, tmp_path, **options))
    clips = extracted(tmp_path)
    found, mask = encoder.eval().encode(*clips)
    assert found.shape == (2, tokens, 32)
    assert mask.sum(1).tolist() == [tokens, valid]
    assert not found[~mask].any()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"encoder": "evva"}, ConfigError, "unknown encoder 'evva', did you mean 'eva'"),
        ({"encoder": "no_module:x"}, ConfigError, "'no_module:x' cannot be imported"),
        ({"encoder": "eva", "pool": 2}, ConfigError, "layer, class_token and pool are for timm and transformers"),
        ({"image_size": 225, "heads": 5}, ConfigError, "a multiple of patch_size 14; .*width 1408 .* heads 5"),
        ({"encoder": "timm"}, ConfigError, "name is null, and config.json does not name an architecture"),
        ({"encoder": "timm", "name": "vit_tinny"}, ConfigError, "timm cannot build 'vit_tinny'"),
        ({"encoder": "transformers"}, ConfigError, "model_type is missing in config, which random weights need"),
        ({"encoder": "transformers", "config": {"model_type": "no"}}, CheckpointError, "cannot build an encoder"),
        ({"encoder": "transformers", "weights": "FOLDER"}, CheckpointError, "config.json cannot be read"),
    ],
)
def test_refusals(settings: dict[str, Any], error: type, words: str, tmp_path: Path) -> None:
    changed = {key: str(tmp_path) if value == "FOLDER" else value for key, value in settings.items()}
    with pytest.raises(error, match=words):
        encoders.build_vision(parse(VisionSettings, changed, "model.vision"))


@pytest.mark.parametrize(
    ("name", "lacking", "words"),
    [
        ("dinov2", "encoder.layer.0.mlp.fc1.weight", "is incomplete: encoder.layer.0.mlp.fc1.weight missing"),
        ("timm vit", "patch_embed.proj.weight", "missing: patch_embed.proj.weight"),
    ],
)
def test_an_incomplete_folder_is_refused(name: str, lacking: str, words: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    settings = architectures.vision(name, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lacking]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        encoders.build_vision(settings)


def test_the_guide_lists_every_architecture(repository: Path) -> None:
    guide = (repository / "docs" / "weights.md").read_text()
    assert not [name for _, name in ALL if f"| {name} |" not in guide]


def test_the_encoder_of_the_guide_works(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (repository / "docs" / "contributing.md").read_text()
    block = re.search(r"^```python\n(# my_encoder\.py\n.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    assert block is not None
    (tmp_path / "my_encoder.py").write_text(block[1])
    monkeypatch.syspath_prepend(tmp_path)
    model = small_model(vision=VisionSettings(encoder="my_encoder:Patches", image_size=28))
    _, samples = batch("vision", model, tmp_path)
    model(samples)["loss"].backward()
    assert model.image_query_tokens.grad.abs().max() > 0
    assert model.visual_encoder.tokens.weight.grad is None
