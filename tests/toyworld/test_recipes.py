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
from lavis_chatbridge.prompting import Text
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


def test_a_limited_teacher_asks_about_the_first_values_only(recipes: SimpleNamespace) -> None:
    reading, rng = recipes.reading, random.Random(0)
    words = set()
    for _ in range(100):
        scenes = [reading.random_scene("image", rng, 2), reading.random_scene("audio", rng, 2)]
        words |= set(re.findall(r"\w+", reading.Teacher(scenes, rng, 2).ask("compare").text))
    attributes = reading.ATTRIBUTES
    everything = {value for m in ("image", "audio") for values in attributes[m].values() for value in values}
    allowed = {value for m in ("image", "audio") for values in attributes[m].values() for value in values[:2]}
    assert words & everything == allowed


def test_mirrored_stills_have_mirrored_places(recipes: SimpleNamespace) -> None:
    pools = recipes.pools
    batch = next(pools.still_batches(pools.render_stills(20, 56, seed=0), 256, seed=0))
    place = batch.labels[:, pools.STILL_ATTRIBUTES.index("place")]
    x = batch.targets[:, 0]
    assert (x[place == 0] < -0.3).all()  # left
    assert (x[place == 1] > 0.3).all()  # right


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
    monkeypatch.setattr(sys.modules["pretrain_encoders"], "FRESH", 12)
    module.main([*words.split(), "--out", str(tmp_path)])
    assert (tmp_path / written).is_file()


def test_training_an_encoder_lowers_the_loss(recipes: SimpleNamespace) -> None:
    pools, training = recipes.pools, recipes.pretrain_encoders
    torch.manual_seed(0)
    encoder = EvaVit(training.VISION)
    training.spread_weights(encoder)
    heads = training.Heads(training.VISION.width, [6, 8, 2, 5], targets=3)
    batches = pools.still_batches(pools.render_stills(24, training.VISION.image_size, seed=1), 24, seed=1)

    def encode(batch) -> tuple[Tensor, Tensor]:
        tokens = encoder(batch.inputs[0])
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)

    batch = next(batches)
    first = training.loss_of(heads(*encode(batch)), batch).item()
    recipe = training.Recipe(renderings=24, steps=40, warmup=5)
    training.fit(nn.ModuleList([encoder, heads]), encode, heads, batches, recipe, score=lambda: "")
    assert training.loss_of(heads(*encode(batch)), batch).item() < 0.5 * first
