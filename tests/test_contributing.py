"""docs/contributing.md followed to the letter: its blocks are what is run, in the place where it says they belong."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from lavis.common.registry import registry
from PIL import Image

from lavis_chatbridge.chat import Session, load_model
from lavis_chatbridge.datasets import builders
from lavis_chatbridge.datasets.readers import READERS
from lavis_chatbridge.prompting import Slot, alignment_prompt
from tests.models.building import small_settings

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    return GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def blocks(heading: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section(heading), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def birds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with two songs, in Clotho's form and in one that no reader knows."""
    monkeypatch.setenv("CHATBRIDGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "birds" / "audio").mkdir(parents=True)
    captions = [f"caption_{number}" for number in range(1, 6)]
    with (tmp_path / "birds/train.csv").open("w", newline="") as known, (tmp_path / "own.csv").open("w") as own:
        table = csv.writer(known)
        table.writerow(["file_name", *captions])
        own.write("file,song\n")
        for name in ("wren", "robin"):
            soundfile.write(tmp_path / f"birds/audio/{name}.wav", np.zeros(8000, np.float32), 16_000)
            table.writerow([f"{name}.wav", *(f"a {name} sings, {number}" for number in captions)])
            own.write(f"{name}.wav,a {name} sings\n")
    return tmp_path


def test_a_row_is_a_data_set(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [row] = blocks("A data set", "yaml")
    assert len(row.splitlines()) == 6, "the name of the section, and 'about five lines'"
    (birds / "rows").mkdir()
    (birds / "rows" / "birds.yaml").write_text(row, encoding="utf-8")
    monkeypatch.setattr(builders, "CONFIG_FOLDER", birds / "rows")
    builders.register_builders()
    try:
        group = registry.get_builder_class("align_birds")({"data_root": str(birds)}).build_datasets()["train"]
        assert [source.name for source in group.sources] == ["align_birds"]
        sample = group.sources[0].sample(0)
        assert sample.captions[4] == "a wren sings, caption_5"
        item = group[0]
        assert item["pieces"][0] == Slot("audio", 0)
        assert len(item["audio"]) == 1
    finally:
        registry.mapping["builder_name_mapping"].pop("align_birds")


def test_a_reader_reads_a_new_format(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = blocks("A data set", "python")
    written: dict[str, Any] = {}
    exec(compile(code, "contributing.md", "exec"), written)
    assert len(code.partition("def birds")[2].splitlines()) <= 10, "'about ten lines'"
    monkeypatch.setitem(READERS, "birds", written["birds"])
    own = {"data_root": str(birds), "reader": "birds", "splits": {"train": "own.csv"}}
    media = {"media": {"audio": "birds/audio/{file}"}, "stage": "alignment"}
    [source] = registry.get_builder_class("chatbridge_jsonl")({**own, **media}).build_datasets()["train"].sources
    found = [source.sample(index) for index in range(len(source))]
    assert [(sample.id, sample.captions) for sample in found] == [
        ("wren.wav", ("a wren sings",)),
        ("robin.wav", ("a robin sings",)),
    ]
    assert [Path(sample.media[0].path).name for sample in found] == ["wren.wav", "robin.wav"]


def test_a_processor_of_ones_own_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's module beside ``my_train.py``, which trains a step with it."""
    module, script = blocks("A processor", "python")
    [line] = re.findall(r"`preprocess: (\{.*?\})`\. It must", section("A processor"))
    (tmp_path / "mirrored.py").write_text(module, encoding="utf-8")
    left = np.zeros((56, 56, 3), np.uint8)
    left[:, :28] = 255
    Image.fromarray(left).save(tmp_path / "left.png")
    lines = [{"id": str(i), "media": [{"type": "image", "path": "left.png"}], "captions": ["left"]} for i in range(2)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    preprocess = yaml.safe_load(line)
    preprocess["vis_processor"]["train"] = preprocess["vis_processor"]["eval"]  # so that the step sees it
    run = {"task": "chatbridge_alignment", "max_iters": 1, "batch_size_train": 2, "num_workers": 0, "job_id": ""}
    config = {
        "model": {"arch": "chatbridge", "model_type": "tiny", "checkpoint": None},
        "preprocess": preprocess,
        "datasets": {"chatbridge_jsonl": {"data_root": str(tmp_path), "splits": {"train": "train.jsonl"}}},
        "run": {**run, "init_lr": 1e-3, "output_dir": str(tmp_path / "out")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["my_train.py", "--cfg-path", str(tmp_path / "run.yaml")])
    try:
        with pytest.raises(SystemExit) as ended:
            exec(compile(script, "my_train.py", "exec"), {"__name__": "__main__"})
        assert ended.value.code == 0
        assert (tmp_path / "out" / "model.safetensors").is_file()
        mirrored = registry.get_processor_class("mirrored_image_eval").from_config({"image_size": 56})
        plain = registry.get_processor_class("chatbridge_image_eval").from_config({"image_size": 56})
        assert torch.equal(mirrored(left), plain(left).flip(-1))
        assert not torch.equal(mirrored(left), plain(left))
    finally:
        registry.mapping["processor_name_mapping"].pop("mirrored_image_eval", None)
        sys.modules.pop("mirrored", None)


SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
OTHERS = {
    "qwen2": {**SIZES, "num_key_value_heads": 2},
    "gemma2": {**SIZES, "num_key_value_heads": 2, "head_dim": 12},
    "gpt_neox": SIZES,
    "opt": {"hidden_size": 48, "word_embed_proj_dim": 24, "ffn_dim": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "do_layer_norm_before": False},
}
"""Architecture -> its sizes in its own names; OPT's embeddings are narrower than its layers."""


@pytest.fixture(scope="module")
def tokenizer(golden_dir: Path) -> Path:
    return golden_dir / "tokenizer"


@pytest.mark.parametrize("architecture", OTHERS)
def test_a_language_model_is_a_folder(architecture: str, tokenizer: Path, tmp_path: Path) -> None:
    """The section's YAML on a folder of another architecture: a loss, gradients of the bridge, an answer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=640, **OTHERS[architecture])
    llm = AutoModelForCausalLM.from_config(config)
    shutil.copytree(tokenizer, tmp_path / "my-llm")
    llm.save_pretrained(tmp_path / "my-llm")
    [text] = blocks("A language model", "yaml")
    values = yaml.safe_load(text.replace("/models/my-llm", str(tmp_path / "my-llm")))
    small = small_settings(tokenizer)  # of the encoders and the perceiver: the guide's are the paper's
    values["model"] |= {
        "vision": {"weights": None, "image_size": 28, "width": 32, "depth": 1, "heads": 4, "dtype": "float32"},
        "audio": {"weights": None, "config": vars(small.audio.config), "dtype": "float32"},
        "perceiver": {"weights": None, "width": 32, "layers": 2, "heads": 4, "feed_forward": 48, "queries": 3},
    }
    values["preprocess"] = {f"{kind}_processor": {"eval": {"image_size": 28}} for kind in ("vis", "video")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    model, processors = load_model(tmp_path / "run.yaml", device="cpu")
    assert model.llama_model.config.model_type == architecture
    assert model.llama_model.dtype == torch.bfloat16
    assert model.llama_proj.out_features == llm.get_input_embeddings().embedding_dim
    assert not any(parameter.requires_grad for parameter in model.llama_model.parameters())
    picture = np.full((28, 28, 3), 90, np.uint8)
    batch = {"pieces": [alignment_prompt(("image",), "a cat")], "image": [[processors["image"]["eval"](picture)]]}
    model.train()
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        loss = model(batch)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0], losses
    answer = Session(model, processors).ask("what is it?", images=[picture], max_new_tokens=4)
    assert answer.media[0].tokens == 3
    assert 1 <= answer.tokens <= 4


def apply(diff: str, root: Path) -> int:
    """Change a copy of the package as a block of the guide says; the number of lines that it adds."""
    added = 0
    for _, path, hunks in re.findall(r"^--- (\S+)\n\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", diff, re.DOTALL | re.MULTILINE):
        file = root / path
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        for hunk in hunks.split("@@\n")[1:]:
            lines = [(line[:1] or " ", line[1:] + "\n") for line in hunk.splitlines()]
            before = "".join(line for sign, line in lines if sign != "+")
            after = "".join(line for sign, line in lines if sign != "-")
            assert text.count(before) == 1, f"{path} holds this {text.count(before)} times:\n{before}"
            text = text.replace(before, after) if before else after
            added += sum(sign == "+" and bool(line.strip()) for sign, line in lines)
        file.write_text(text, encoding="utf-8")
    return added


ENCODERS = """
import json, sys
import torch
from lavis_chatbridge import cli
from lavis_chatbridge.chat import Session, load_model
from lavis_chatbridge.plugin import train

facts = {"package": cli.__file__}
from timm.models.vision_transformer import VisionTransformer

torch.manual_seed(0)
published = VisionTransformer(img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=4, num_classes=10)
torch.save(published.state_dict(), "vit.pth")
facts["check"] = cli.main(["weights", "check", "vit.pth", "--cfg-path", "run.yaml"])
facts["train"] = train.main(["--cfg-path", "run.yaml"])
model, processors = load_model("run.yaml", ["model.checkpoint=out/model.safetensors"], "cpu")
published.norm = torch.nn.Identity()
picture = torch.randn(2, 3, 28, 28)
with torch.no_grad():
    difference = (model.visual_encoder(picture) - published.eval().forward_features(picture)).abs().max()
    bank = torch.randn(1, 64, 32)
    padded = torch.cat([bank, torch.zeros(1, 32, 32)], 1)
    alone, mask = model.audio_encoder(bank)
    beside, hidden = model.audio_encoder(padded, torch.tensor([64]))
facts["vision"] = float(difference)
facts["audio"] = float((alone - beside[:, : alone.shape[1]]).abs().max())
facts["masks"] = [int(mask.sum()), int(hidden.sum()), hidden.numel()]
facts["encoders"] = [type(model.visual_encoder).__module__, type(model.audio_encoder).__module__]
session = Session(model, processors)
answer = session.ask("what is it?", images=["a.png"], audios=["a.wav"], max_new_tokens=3)
facts["heard"] = [(note.kind, note.reached) for note in answer.media]
print(json.dumps(facts))
"""


def test_encoders_of_other_architectures(tmp_path: Path) -> None:
    """Both changes of the section on a copy of the package: weights are checked and loaded, a bridge is trained."""
    package = tmp_path / "changed" / "lavis_chatbridge"
    shutil.copytree(ROOT / "lavis_chatbridge", package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (package / "assets").symlink_to(ROOT / "lavis_chatbridge" / "assets")
    promised = [int(number) for number in re.findall(r"takes (\d+) lines:", section("An encoder"))]
    assert [apply(diff, package.parent) for diff in blocks("An encoder", "diff")] == promised

    Image.new("RGB", (28, 28), (200, 60, 0)).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(16_000) / 9.0).astype(np.float32), 16_000)
    paths = {"image": "a.png", "audio": "a.wav"}
    lines = [
        {"id": kind, "media": [{"type": kind, "path": path}], "captions": ["a cat"]} for kind, path in paths.items()
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    sizes = {"image_size": 28, "patch_size": 14, "width": 32, "depth": 2, "heads": 4, "mlp_ratio": 4.0}
    sounds = {"encoder_embed_dim": 32, "encoder_layers": 1, "encoder_ffn_embed_dim": 48, "encoder_attention_heads": 4}
    small = {"eval": {"image_size": 28}, "train": {"image_size": 28}}
    config = {
        "model": {
            "arch": "chatbridge",
            "model_type": "tiny",
            "vision": {"arch": "vit", "weights": "vit.pth", **sizes},
            "audio": {"weights": None, "config": {"arch": "patches", "conv_pos_groups": 1, **sounds}},
            "checkpoint": None,
        },
        "preprocess": {"vis_processor": small, "video_processor": small},
        "datasets": {"chatbridge_jsonl": {"data_root": str(tmp_path), "splits": {"train": "train.jsonl"}}},
        "run": {"task": "chatbridge_alignment", "max_iters": 2, "batch_size_train": 1, "num_workers": 0}
        | {"init_lr": 1e-3, "output_dir": "out", "job_id": ""},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}
    environment["CHATBRIDGE_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", ENCODERS], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["package"].startswith(str(package))
    assert (facts["check"], facts["train"]) == (0, 0), done.stdout
    assert facts["encoders"] == ["timm.models.vision_transformer", "lavis_chatbridge.models.patches"]
    assert facts["vision"] < 1e-6, "the published weights give the published encoder's tokens"
    assert facts["audio"] < 1e-5, "padding has no influence"
    assert facts["masks"] == [8, 8, 12]
    assert facts["heard"] == [["image", True], ["audio", True]]


def test_every_block_of_the_guide_is_run_above() -> None:
    counts = {name: len(re.findall(rf"^```{name}$", GUIDE, flags=re.MULTILINE)) for name in ("python", "yaml", "diff")}
    assert counts == {"python": 3, "yaml": 2, "diff": 2}
