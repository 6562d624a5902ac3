"""The short part of the suite that also runs on the oldest supported transformers; ``make test`` puts that on the path.

It asks what depends on transformers: LAVIS imports, the plugin's names are known, the Q-Former computes the golden
numbers, and training steps give the golden losses.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

TYPES = {"tiny", "vicuna7b", "vicuna13b"}


@pytest.fixture(scope="module")
def sizes(golden_dir: Path) -> dict[str, Any]:
    """The dimensions of the golden model."""
    return json.loads((golden_dir / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def state(golden_dir: Path) -> dict[str, torch.Tensor]:
    """Its weights, without the Q-Former's table of position numbers, which nothing reads."""
    tensors = load_file(golden_dir / "chatbridge_state.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}


def test_transformers_is_the_version_asked_for():
    import transformers

    assert transformers.__version__ == os.environ.get("EXPECTED_TRANSFORMERS", transformers.__version__)


def test_lavis_imports_and_knows_the_plugins_names():
    from lavis.common.registry import registry
    from lavis.models import model_zoo

    assert set(dict(model_zoo)["chatbridge"]) >= TYPES
    assert "blip2_opt" in dict(model_zoo)
    assert registry.get_runner_class("chatbridge_runner") is not None
    assert registry.get_task_class("chatbridge_alignment") is not None
    assert registry.get_processor_class("chatbridge_image_eval") is not None


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_qformer_computes_the_golden_numbers(kind, golden_dir, sizes, state):
    from lavis_chatbridge.models.encoding import build_perceiver, perceive
    from lavis_chatbridge.models.settings import PerceiverSettings

    golden = load_file(golden_dir / "perceiver.safetensors")
    features = golden[f"{kind}.encoder_features"]
    perceiver = build_perceiver(PerceiverSettings(**_perceiver(sizes["qformer"])), features.shape[-1]).eval()
    weights = {name.removeprefix("Qformer."): value for name, value in state.items() if name.startswith("Qformer.")}
    unknown = perceiver.load_state_dict(weights, strict=False)
    assert not unknown.unexpected_keys
    assert [name for name in unknown.missing_keys if not name.endswith("position_ids")] == []
    queries = state["audio_query_tokens" if kind == "audio" else "image_query_tokens"]
    with torch.no_grad():
        output = perceive(perceiver, queries, features, torch.ones(features.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(output, golden[f"{kind}.query_output"], atol=2e-5, rtol=0)


def test_training_steps_give_the_golden_losses(golden_dir, sizes, state):
    from lavis_chatbridge.models.chatbridge import ChatBridge

    model = ChatBridge.from_config(_model_section(golden_dir, sizes))
    unknown = model.load_state_dict(state, strict=False)
    assert [name for name in unknown.missing_keys if not name.endswith("position_ids")] == []
    case = json.loads((golden_dir / "stage1.json").read_text(encoding="utf-8"))["image"]
    samples = {"image": load_file(golden_dir / "encode.safetensors")["image"], "text_input": case["text"]}
    expected = json.loads((golden_dir / "adamw.json").read_text(encoding="utf-8"))["image_x5"]["loss_before_each_step"]

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05)
    # The golden losses were taken without dropout.
    model.eval()
    losses = []
    for _ in expected[:2]:
        optimiser.zero_grad()
        loss = model(samples)["loss"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected[:2], abs=5e-5)


@pytest.mark.parametrize(("how", "bound"), [("8bit", 0.02), ("4bit", 0.12)])
def test_a_language_model_in_fewer_bits_says_nearly_the_same(how, bound, tmp_path, golden_dir, sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    from lavis_chatbridge.models.language_model import load_language_model
    from lavis_chatbridge.models.settings import LanguageModelSettings

    torch.manual_seed(7)
    wide = {**sizes["llama"], "hidden_size": 64, "intermediate_size": 160, "initializer_range": 0.06}
    LlamaForCausalLM(LlamaConfig(**wide)).save_pretrained(tmp_path)
    embeds = torch.randn(2, 7, 64, requires_grad=True)
    found = []
    for quantization in (None, how):
        names = {"weights": str(tmp_path), "tokenizer": str(golden_dir / "tokenizer")}
        chosen = LanguageModelSettings(**names, quantization=quantization)
        logits = load_language_model(chosen)[0](inputs_embeds=embeds).logits
        found.append((logits.detach(), *torch.autograd.grad(logits.logsumexp(-1).sum(), embeds)))
    for part, (own, whole) in enumerate(zip(*reversed(found), strict=True)):
        assert 0 < (own - whole).norm() / whole.norm() < bound * (1, 3)[part]


def _perceiver(qformer: dict[str, Any]) -> dict[str, Any]:
    return {
        "width": qformer["hidden_size"],
        "layers": qformer["num_hidden_layers"],
        "heads": qformer["num_attention_heads"],
        "feed_forward": qformer["intermediate_size"],
        "cross_attention_every": qformer["cross_attention_freq"],
        "queries": qformer["num_query_token"],
        "norm_eps": qformer["layer_norm_eps"],
    }


def _model_section(golden_dir: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    vit, beats = sizes["vit"], sizes["beats"]
    known = "input_patch_size embed_dim encoder_layers encoder_embed_dim encoder_ffn_embed_dim encoder_attention_heads"
    known += " conv_pos conv_pos_groups num_buckets max_distance"
    return {
        "arch": "chatbridge",
        "vision": {
            "image_size": vit["img_size"],
            "patch_size": vit["patch_size"],
            "width": vit["embed_dim"],
            "depth": vit["depth"],
            "heads": vit["num_heads"],
            "mlp_ratio": vit["mlp_ratio"],
        },
        "audio": {"config": {name: beats[name] for name in known.split()}},
        "perceiver": _perceiver(sizes["qformer"]),
        "language_model": {
            "config": {"model_type": "llama", **sizes["llama"]},
            "tokenizer": str(golden_dir / "tokenizer"),
        },
        "temporal_positions": None,
        "prompt_layout": "original",
    }
