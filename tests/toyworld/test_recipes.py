"""projects/toyworld: the scripts run, and the shipped tiny parts see, hear and read the embedded world."""

from __future__ import annotations

import itertools
import random
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import lavis_chatbridge
from lavis_chatbridge.models.encoders.beats import Beats
from lavis_chatbridge.models.encoders.eva import EvaVit
from lavis_chatbridge.prompting.conversation import Text
from lavis_chatbridge.toyworld.language import QUESTION_KINDS

ASSETS = Path(lavis_chatbridge.__file__).parent / "assets" / "tiny"
SCRIPTS = Path(__file__).resolve().parents[2] / "projects" / "toyworld"
TESTED = 64


@pytest.fixture(scope="module")
def recipes() -> SimpleNamespace:
    """The four modules of projects/toyworld."""
    names = ("pools", "reading", "pretrain_encoders", "pretrain_llm")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return SimpleNamespace(**{name: import_module(name) for name in names})


def probe(features: Tensor, labels: Tensor) -> list[float]:
    """Accuracy per attribute on the last `TESTED` rows of a ridge regression that is fitted to the other rows."""
    features = functional.layer_norm(features, features.shape[-1:])
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    right = []
    for column in labels.unbind(1):
        train, test = column >= 0, column >= 0
        train[-TESTED:], test[:-TESTED] = False, False
        if test.any():
            x, y = features[train], functional.one_hot(column[train]).double()
            weights = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
            right.append(((features[test] @ weights).argmax(1) == column[test]).double().mean().item())
    return right


def shipped(recipes: SimpleNamespace, name: str, module: nn.Module) -> nn.Module:
    module.load_state_dict(load_file(ASSETS / recipes.pretrain_encoders.FILES[name]))
    return module.eval()


@torch.no_grad()
def test_the_shipped_vision_encoder_sees_every_attribute(recipes: SimpleNamespace) -> None:
    encoder = shipped(recipes, "vision", EvaVit(recipes.pretrain_encoders.VISION))
    stills = recipes.pools.render_stills(720, recipes.pretrain_encoders.VISION.image_size, seed=77)
    features = functional.layer_norm(encoder(stills.pixels.float()), (96,)).mean(1)
    order = torch.randperm(360, generator=torch.Generator().manual_seed(0))
    assert min(probe(features[:360][order], stills.labels[:360][order])) >= 0.95
    assert min(probe(features[360:][order], stills.labels[360:][order])) >= 0.95


@torch.no_grad()
def test_the_shipped_audio_encoder_hears_every_attribute(recipes: SimpleNamespace) -> None:
    pools, encoder = recipes.pools, shipped(recipes, "audio", Beats(recipes.pretrain_encoders.BEATS))
    sounds = pools.render_sounds(220, seed=78)
    features = []
    for start in range(0, 220, 20):
        some = range(start, start + 20)
        tokens, mask = encoder(*pools.sound_batch([sounds.fbanks[i][:512] for i in some], sounds, some).inputs)
        heard = functional.layer_norm(tokens, tokens.shape[-1:]) * mask.unsqueeze(-1)
        features.append(heard.sum(1) / mask.sum(1, keepdim=True))
    assert min(probe(torch.cat(features), sounds.labels)) >= 0.95


def test_the_shipped_language_model_answers_in_words(recipes: SimpleNamespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "llm", dtype=torch.float32)
    scores = recipes.pretrain_llm.gate(model, AutoTokenizer.from_pretrained(ASSETS / "llm"), questions=60, seed=11)
    assert set(scores) == set(QUESTION_KINDS)
    assert min(scores.values()) >= 0.95, scores


def test_every_word_of_the_world_is_one_token(recipes: SimpleNamespace) -> None:
    tokenizer = recipes.pretrain_llm.make_tokenizer()
    rng = random.Random("words")
    passages = [recipes.reading.passage(rng, recipes.reading.LEVELS[-1]) for _ in range(300)]
    texts = [piece.text for piece in itertools.chain(*passages) if isinstance(piece, Text)]
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    assert [word for word in sorted(words) if len(tokenizer(word, add_special_tokens=False)["input_ids"]) != 1] == []
    assert tokenizer.tokenize("red###Human: what") == ["Ġred", "###", "ĠHuman", ":", "Ġwhat"]
    for text in (" Hé, wörld <image> 日本", " 3.5 km", " tab\there"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    ("script", "words", "written"),
    [
        ("pretrain_encoders", "vision --renderings 16 --steps 1", "eva_vit.safetensors"),
        ("pretrain_encoders", "audio --renderings 60 --steps 1", "beats.safetensors"),
        (
            "pretrain_llm",
            "--steps 1 --width 16 --layers 1 --heads 2 --feed-forward 16 --passages 2 --groups 1 --questions 1",
            "gate.json",
        ),
    ],
)
def test_a_script_runs(
    recipes: SimpleNamespace, script: str, words: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: ModuleType = getattr(recipes, script)
    monkeypatch.setattr(sys.modules["pretrain_encoders"], "UNSEEN", 12)
    module.main([*words.split(), "--out", str(tmp_path)])
    assert (tmp_path / written).is_file()
