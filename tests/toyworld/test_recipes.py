"""projects/toyworld: the scripts run, the shipped tiny parts see, hear and read the embedded world; the report."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import lavis_chatbridge
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import write_json
from lavis_chatbridge.models.encoders.beats import Beats
from lavis_chatbridge.models.encoders.eva import EvaVit
from lavis_chatbridge.prompting.conversation import Text
from lavis_chatbridge.toyworld.language import QUESTION_KINDS

ASSETS = Path(lavis_chatbridge.__file__).parent / "assets" / "tiny"
SCRIPTS = Path(__file__).resolve().parents[2] / "projects" / "toyworld"
TESTED = 64


@pytest.fixture(scope="module")
def recipes() -> SimpleNamespace:
    """The modules of projects/toyworld."""
    names = ("pools", "reading", "pretrain_encoders", "pretrain_llm", "report")
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
def test_a_script_runs(recipes, script: str, words: str, written: str, tmp_path: Path, monkeypatch) -> None:
    module: ModuleType = getattr(recipes, script)
    monkeypatch.setattr(sys.modules["pretrain_encoders"], "UNSEEN", 12)
    module.main([*words.split(), "--out", str(tmp_path)])
    assert (tmp_path / written).is_file()


# --- the report

FACTS = {"image": {"colour": "red"}, "video": {"motion": "up"}, "audio": {"pitch": "low"}}


def scored(run: Path, split: str, records: list[dict], chance: float | None = None, **scores: float) -> None:
    """The files of an evaluation: predictions, and scores in percent of each source."""
    (run / "result").mkdir(parents=True, exist_ok=True)
    (run / "result" / f"{split}_step0.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"scores": scores} | ({} if chance is None else {"chance": chance})
    by_source = {record["source"]: entry for record in records}
    write_json(run / "result" / f"{split}_step0_metrics.json", {"by_source": by_source})


def captions(split: str) -> list[dict]:
    caption = {"prediction": "a <b>red</b> thing", "prompt": ""}
    return [
        {"sample_id": f"{modality}_{split}_00000", "source": f"world/{modality}", "facts": facts, **caption}
        for modality, facts in FACTS.items()
    ]


def joint(*right: str) -> list[dict]:
    prompt = "###Human: Given following image: [image 0].###Human: name both###Assistant:"
    asked = {"sample_id": "joint_00000_name", "source": "world_joint", "answers": ["red and low"], "prompt": prompt}
    texts = {kind: "Red and low." if kind in right else "blue and low" for kind in QUESTION_KINDS}
    return [asked | {"facts": {}, "meta": {"asked": kind}, "prediction": text} for kind, text in texts.items()]


@pytest.fixture
def demo(recipes: SimpleNamespace, tmp_path: Path) -> Path:
    annotations = tmp_path / "world" / "annotations"
    annotations.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "world" / "a.png")
    files = {f"{m}_{split}": (m, f"{m}_{split}_00000") for m in FACTS for split in ("test", "heldout")}
    for name, (modality, sample) in (files | {"joint_test": ("image", "joint_00000_name")}).items():
        line = {"id": sample, "media": [{"type": modality, "path": "a.png"}]}
        (annotations / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    folder = tmp_path / "demo"
    scored(folder / "stage1_scores", "test", captions("test"), 25.0, attribute_accuracy=90.0)
    scored(folder / "stage1_scores", "heldout", captions("heldout"), 25.0, attribute_accuracy=80.0)
    scored(folder / "stage1_scores", f"test{recipes.report.SHUFFLED}", captions("test"), attribute_accuracy=26.0)
    (folder / "stage1").mkdir()
    log = [{"train_step": 1, "train_loss": 3.5}, {"train_step": 9, "train_loss": 1.5}]
    (folder / "stage1" / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def test_stage_1_scores_come_from_the_runs_and_the_page_is_complete(recipes: SimpleNamespace, demo: Path) -> None:
    found = recipes.report.write_report(demo, demo.parent / "world")
    expected = {"accuracy": 0.9, "heldout": 0.8, "shuffled": 0.26, "text_prior": 0.25}
    assert found["stage1"] == {modality: pytest.approx(expected) for modality in FACTS}
    assert json.loads((demo / "report.json").read_text())["stage1"]["audio"]["shuffled"] == pytest.approx(0.26)
    page = (demo / "report.html").read_text()
    assert "from 3.500 to 1.500" in page
    assert "data:image/png;base64," in page
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", page)
    assert "a &lt;b&gt;red&lt;/b&gt; thing" in page
    assert "<b>" not in page


def test_joint_scores_are_those_of_the_composing_kinds(recipes: SimpleNamespace, demo: Path) -> None:
    for split in ("test", "heldout"):
        scored(demo / "stage2_scores", split, captions(split), exact_match=75.0)
    scored(demo / "joint", "words", joint(*QUESTION_KINDS))
    scored(demo / "joint", "test", joint("name", "compose", "conditional"))
    for withheld, right in (
        ("image_video", QUESTION_KINDS[:2]),
        ("audio", QUESTION_KINDS[:1]),
        ("image_video_audio", ()),
    ):
        scored(demo / "joint", f"test_withheld_{withheld}", joint(*right))
    found = recipes.report.write_report(demo, demo.parent / "world")
    assert found["stage2"]["video"] == {"accuracy": 0.75, "heldout": 0.75}
    means = {name: found["joint"][name] for name in recipes.report.JOINT}
    assert means == pytest.approx({"both": 2 / 3, "no_vision": 2 / 3, "no_audio": 1 / 3, "neither": 0.0})
    assert (found["joint"]["by_kind"]["compare"], found["joint"]["text_only"]["compare"]) == (0.0, 1.0)
    assert "joint both" in recipes.report.summary(found)


def test_a_missing_run_is_named(recipes: SimpleNamespace, demo: Path) -> None:
    (demo / "stage1_scores" / "result" / f"test{recipes.report.SHUFFLED}_step0_metrics.json").unlink()
    with pytest.raises(DataError, match=r"result has no test_shuffled_image_video_audio_step\*_metrics.json: run the"):
        recipes.report.write_report(demo, demo.parent / "world")
