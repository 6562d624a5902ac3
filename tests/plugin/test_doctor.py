"""``chatbridge doctor``: what stops a run is a fault with its remedy, what is well is said, the exit status follows."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from lavis_chatbridge import cli
from lavis_chatbridge.config import parse
from lavis_chatbridge.models.settings import ModelSettings
from lavis_chatbridge.models.weights import model_settings
from lavis_chatbridge.plugin import doctor
from lavis_chatbridge.plugin.doctor import Finding, training_memory

YAML = """
model: {{arch: chatbridge, model_type: {model_type}}}
datasets:
  chatbridge_world_caption: {{data_root: {folder}/world}}
run: {{task: chatbridge_alignment, max_iters: 1, batch_size_train: 4}}
"""


@pytest.fixture
def config(tmp_path):
    def write(model_type="tiny"):
        (tmp_path / "run.yaml").write_text(YAML.format(model_type=model_type, folder=tmp_path))
        return str(tmp_path / "run.yaml")

    return write


def test_unmet_requirements_and_broken_packages_are_faults(monkeypatch):
    wanted = ["torch>=99", "no-such-package>=1", "numpy", 'peft>=9; extra == "lora"']
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    for name in ("lavis", "decord"):
        monkeypatch.setitem(sys.modules, name, None)
    torch, absent, lavis, decord = [text for level, text in doctor.packages() if level == "FAULT"]
    assert torch.endswith("is installed: pip install 'torch>=99'")
    assert absent == "no-such-package is not installed: pip install 'no-such-package>=1'"
    assert decord.startswith("decord cannot be imported (ModuleNotFoundError")
    assert "eva-decord" in decord
    assert lavis.endswith("If it is not installed: pip install --no-deps salesforce-lavis==1.0.2")


def test_missing_java_is_a_warning(monkeypatch):
    monkeypatch.setattr("lavis_chatbridge.tasks.scoring.captions.unavailable", lambda: {"METEOR": "no Java"})
    assert list(doctor.scores()) == [Finding("warning", "METEOR: no Java")]


def test_a_sound_configuration(config, capsys, monkeypatch):
    for look in ("packages", "scores"):
        monkeypatch.setattr(doctor, look, lambda: iter([Finding("ok", "well")]))
    assert cli.main(["doctor", "--cfg-path", config()]) == 0
    printed = capsys.readouterr().out
    assert "model.vision.weights" in printed
    assert "GPU memory of a training process, estimated" in printed
    assert printed.endswith("nothing stops a run\n")


def test_missing_weights_and_faulty_configurations(config, tmp_path, monkeypatch):
    monkeypatch.setenv("CHATBRIDGE_WEIGHTS", str(tmp_path))
    found = list(doctor.configuration(config("vicuna13b"), []))
    faults = [text for level, text in found if level == "FAULT"]
    parts = ("language_model", "vision", "audio", "perceiver")
    assert [text.split(":")[0] for text in faults] == [f"model.{part}.weights" for part in parts]
    assert "published by https://github.com/microsoft/unilm" in faults[2]
    fault, *others = doctor.configuration(config(), ["run.max_itres=3"])
    assert "did you mean 'max_iters'" in fault.text
    assert others[0].text.startswith("model.language_model.weights")
    [fault] = doctor.configuration(config("no_such_type"), [])
    assert "no_such_type" in fault.text


def test_the_exit_status_counts_faults(monkeypatch, capsys):
    for look in ("packages", "devices", "scores"):
        monkeypatch.setattr(doctor, look, lambda: iter([Finding("warning", "w")]))
    assert cli.main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "packages", lambda: iter([Finding("FAULT", "broken:\n mend it")]))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "  FAULT    broken: mend it\n" in printed
    assert printed.endswith("\n1 fault\n")


def test_an_earlier_training_in_the_folder_is_a_fault(config, tmp_path, capsys):
    (tmp_path / "out" / "checkpoints" / "step_00000003").mkdir(parents=True)
    options = ["--options", f"run.output_dir={tmp_path / 'out'}"]
    for more, faults in ((["run.job_id=''"], 1), (["run.job_id=''", "run.overwrite=true"], 0), ([], 0)):
        cli.main(["doctor", "--cfg-path", config(), *options, *more])
        found = [line for line in capsys.readouterr().out.splitlines() if "of an earlier training" in line]
        assert [line.split()[0] for line in found] == ["FAULT"] * faults


def sizes(model_type: str, names: str, *numbers: int, **more: Any) -> dict[str, Any]:
    """A configuration of transformers; ``names`` are those of the numbers."""
    return {"model_type": model_type, **dict(zip(names.split(), numbers, strict=True)), **more}


LLM = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
VIT = "hidden_size num_hidden_layers num_attention_heads intermediate_size image_size patch_size"
WHISPER = "d_model encoder_layers encoder_attention_heads encoder_ffn_dim num_mel_bins decoder_layers"
SIZES = {
    "13b": sizes("llama", LLM, 32_000, 5120, 13_824, 40, 40, 40),
    "SmolLM2-360M": sizes("llama", LLM, 49_152, 960, 2560, 32, 15, 5, tie_word_embeddings=True),
    "Qwen3-8B": sizes("qwen3", LLM, 151_936, 4096, 12_288, 36, 32, 8, head_dim=128),
    "siglip2-base": sizes("siglip_vision_model", VIT, 768, 12, 12, 3072, 224, 16),
    "siglip2-so400m": sizes("siglip_vision_model", VIT, 1152, 27, 16, 4304, 384, 14),
    "whisper-small": sizes("whisper", WHISPER, 768, 12, 12, 3072, 80, 1, decoder_attention_heads=12),
    "whisper-large-v3": sizes("whisper", WHISPER, 1280, 32, 20, 5120, 128, 1, decoder_attention_heads=20),
}
TYPES = {
    "vicuna13b": ("13b", None, None),
    "small": ("SmolLM2-360M", "siglip2-base", "whisper-small"),
    "qwen3_8b": ("Qwen3-8B", "siglip2-so400m", "whisper-large-v3"),
}


def shipped(model_type: str) -> ModelSettings:
    """A shipped type with the published sizes in place of its files."""
    values = model_settings(model_type).model_dump()
    llm, vision, audio = TYPES[model_type]
    values["language_model"] |= {"weights": None, "config": SIZES[llm], "tokenizer": "t"}
    values["vision"] |= {"weights": None} | ({"config": SIZES[vision]} if vision else {})
    values["audio"] |= {"weights": None} | ({"config": SIZES[audio]} if audio else {})
    return parse(ModelSettings, values, "model")


@pytest.fixture(autouse=True)
def _a_cpu_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavis_chatbridge.models.settings.slow_on_cpu", lambda dtype: False)


@pytest.mark.parametrize(
    ("model_type", "batch", "checkpointing", "gib", "millions"),
    [
        ("small", 8, False, 7, (361.8, 92.9, 88.2)),
        ("qwen3_8b", 16, True, 32, (8190.7, 428.2, 637.0)),
        ("vicuna13b", 32, False, 80, (13015.9, 985.9, 90.3)),
    ],
)
def test_shipped_types_have_published_sizes_and_fit(
    model_type: str, batch: int, checkpointing: bool, gib: int, millions: tuple[float, ...]
) -> None:
    """The batches are those of projects/chatbridge/TYPE/align.yaml."""
    parts = training_memory(shipped(model_type), batch, checkpointing)
    found = [parts[part] / 2e6 for part in ("language model", "vision encoder", "audio encoder")]
    assert found == pytest.approx(millions, abs=0.1)
    assert (gib - 10) * 2**30 < sum(parts.values()) < gib * 2**30
