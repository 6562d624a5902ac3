"""Language models of many families through every stage, and one line of refusal for unsupported ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.answering import candidate_scores
from lavis_chatbridge.models.chatbridge import losses_at
from lavis_chatbridge.models.decoding import Decoder, Prefix, padded
from lavis_chatbridge.models.families import positions_of
from lavis_chatbridge.models.language_model import TESTED, check_family, load_language_model
from lavis_chatbridge.models.settings import LanguageModelSettings
from tests.models.building import SIZES, TOKENIZER, answers, prompt, reply, tiny

SIZES_OF: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 2},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
    "phi3": {"sliding_window": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
}
SUPPORTED = {name: SIZES_OF.get(name, {}) for name in sorted(TESTED)}
PROMPTS = [prompt(2, 3, seed=1), prompt(5, 7, seed=2), prompt(1, 1, seed=3)]
REPLIES = [reply(*one) for one in PROMPTS]
BEAMS = {"tokens": 4, "num_beams": 3}


def stages(model: Any) -> dict[str, bool]:
    """The stages in docs/weights.md, and whether each works."""
    embeds, _ = padded(model, [reply(*PROMPTS[1])])
    embeds.requires_grad_()
    rows, columns, targets = torch.tensor([0, 0]), torch.tensor([9, 13]), torch.tensor([5, 40])
    loss = losses_at(model, rows, columns, targets, inputs_embeds=embeds)
    logits = model(inputs_embeds=embeds).logits[0, columns].float()
    expected = -logits.log_softmax(-1)[[0, 1], targets]
    (slope,) = torch.autograd.grad(loss.sum(), embeds)
    (whole,) = torch.autograd.grad(expected.sum(), embeds)
    with torch.no_grad():
        return {
            "loss": torch.allclose(loss, expected, atol=1e-4),
            "gradient": torch.allclose(slope, whole, atol=1e-4) and bool(slope.abs().sum() > 0),
            "batch = single": answers(model, [reply(*one) for one in PROMPTS]) == alone(model),
            "beams": answers(model, [reply(*one, **BEAMS) for one in PROMPTS]) == alone(model, **BEAMS),
            "ranking": ranking_agrees(model),
            "chat": joined_late(model) == alone(model),
            "chat, kept keys": kept_agrees(model),
        }


def alone(model: Any, **how: Any) -> list[list[int]]:
    return [answers(model, [reply(*one, **how)])[0] for one in PROMPTS]


def ranking_agrees(model: Any) -> bool:
    embeds, mask = padded(model, REPLIES)
    candidates = [[5, 6, 7], [9], [11, 12]]
    scores = candidate_scores(model, embeds, mask, candidates, 3, 4)
    for row, one in zip(scores, REPLIES, strict=True):
        own, _ = padded(model, [one])
        for score, ids in zip(row, candidates, strict=True):
            whole = torch.cat([own, model.get_input_embeddings()(torch.tensor([ids]))], 1)
            values = model(inputs_embeds=whole).logits[0, own.shape[1] - 1 : -1].float().log_softmax(-1)
            if abs(float(values[range(len(ids)), ids].sum() - score)) > 1e-3:
                return False
    return True


def joined_late(model: Any) -> list[list[int]]:
    """Replies that join while others are under way."""
    decoder, replies = Decoder(model), [reply(*one) for one in PROMPTS]
    for one in replies:
        decoder.add(one)
        decoder.step()
    while len(decoder):
        decoder.step()
    return [one.ids for one in replies]


def kept_agrees(model: Any) -> bool:
    """A second question whose beginning was read before."""
    prefix = Prefix()
    elements, media = PROMPTS[1]
    longer = [*elements, *answers(model, [reply(elements, media, prefix)])[0], 44, 45]
    return answers(model, [reply(longer, media, prefix)]) == answers(model, [reply(longer, media)])


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_supported_family_passes_every_stage(name: str) -> None:
    model = tiny(name, **SUPPORTED[name])
    check_family(model)
    assert all(stages(model).values()), stages(model)


def test_the_guide_lists_the_supported_families(repository: Path) -> None:
    guide = " ".join((repository / "docs" / "weights.md").read_text(encoding="utf-8").split())
    assert ", ".join(f"`{name}`" for name in SUPPORTED) in guide


@pytest.mark.parametrize("name", ["mamba", "rwkv", "falcon_h1"])
def test_other_families_are_refused_in_one_line_when_loaded(name: str) -> None:
    config = {**SIZES, "model_type": name, "vocab_size": 640}
    with pytest.raises(ConfigError, match=rf"family '{name}' are not supported .*docs/weights.md") as caught:
        load_language_model(LanguageModelSettings(tokenizer=str(TOKENIZER), config=config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text", "granite", "llama"])
def test_the_first_block_reads_the_same_soft_tokens_under_every_version(name: str) -> None:
    """Gemma's factor sqrt(width) is in the model's forward pass in some versions, in its embedding layer in others."""
    more = {"embedding_multiplier": 12.0} if name == "granite" else {}
    model = tiny(name, **SUPPORTED[name], **more)
    seen: list[torch.Tensor] = []

    def note(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(inputs[0] if inputs else named["hidden_states"])

    model.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    elements, media = PROMPTS[0]
    answers(model, [reply(elements, media, tokens=1)])
    torch.testing.assert_close(seen[0][0, 2:5], media["m1"], atol=1e-5, rtol=1e-4)
    scale = 32**0.5 if name.startswith("gemma") else more.get("embedding_multiplier", 1.0)
    words = model.get_input_embeddings().weight[[e for e in elements if isinstance(e, int)]] * scale
    torch.testing.assert_close(seen[0][0][[0, 1, 5, 6, 7]], words, atol=1e-4, rtol=1e-3)


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("own", "rope", "positions"),
    [
        (100, None, 100),
        (100, {"rope_type": "linear", "factor": 4.0}, 400),
        (100, {"type": "dynamic", "factor": 2.0}, 100),
        (32768, {"type": "yarn", **YARN}, 131072),  # as the card of Qwen2.5 says
        (131072, {"rope_type": "yarn", **YARN}, 131072),
        (131072, {"rope_type": "llama3", "factor": 8.0}, 131072),
        (131072, {"rope_type": "longrope", "original_max_position_embeddings": 4096}, 4096),
        (131072, {"full": {"rope_type": "default"}, "sliding": {"rope_type": "linear", "factor": 2.0}}, 262144),
        (None, None, float("inf")),
    ],
)
def test_positions(own: int | None, rope: dict[str, Any] | None, positions: float) -> None:
    assert positions_of(SimpleNamespace(max_position_embeddings=own, rope_scaling=rope)) == positions
    assert positions_of(SimpleNamespace(n_positions=own, rope_parameters=rope)) == positions


def test_the_positions_of_a_longrope_end_where_its_factors_change() -> None:
    long = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    config = AutoConfig.for_model("phi3", **{**SIZES, "original_max_position_embeddings": 16}, rope_scaling=long)
    assert positions_of(config) == 16
