"""``chatbridge doctor``: what stops a run is a fault with its remedy, what is well is said, the exit status follows."""

from __future__ import annotations

import sys

import pytest

from lavis_chatbridge import cli
from lavis_chatbridge.config import parse
from lavis_chatbridge.models.settings import ModelSettings
from lavis_chatbridge.models.weights import model_settings
from lavis_chatbridge.plugin import doctor
from lavis_chatbridge.plugin.doctor import Finding, training_memory

YAML = """
model: {{arch: chatbridge, model_type: {}}}
datasets: {{chatbridge_world_caption: {{data_root: world}}}}
run: {{task: chatbridge_alignment, max_iters: 1, batch_size_train: 4}}
"""


def config(folder, model_type="tiny"):
    (folder / "run.yaml").write_text(YAML.format(model_type))
    return str(folder / "run.yaml")


def test_the_exit_status_counts_faults(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "packages", lambda: iter([Finding("warning", "w")]))
    monkeypatch.setattr("lavis_chatbridge.tasks.scoring.captions.unavailable", lambda: {"METEOR": "no Java"})
    assert cli.main(["doctor", "--cfg-path", config(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "model.vision.weights" in printed
    assert "  warning  METEOR: no Java\n" in printed
    assert "GPU memory of a training process, estimated" in printed
    assert printed.endswith("nothing stops a run\n")
    monkeypatch.setattr(doctor, "packages", lambda: iter([Finding("FAULT", "broken:\n mend it")]))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "  FAULT    broken: mend it\n" in printed
    assert printed.endswith("\n1 fault\n")
    assert cli.main(["doctor", "--cfg-path", "nope.yaml"]) == 2


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


def test_missing_weights_and_faulty_configurations(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATBRIDGE_WEIGHTS", str(tmp_path))
    faults = [text for level, text in doctor.configuration(config(tmp_path, "vicuna13b"), []) if level == "FAULT"]
    parts = ("language_model", "vision", "audio", "perceiver")
    assert [text.split(":")[0] for text in faults] == [f"model.{part}.weights" for part in parts]
    fault, *others = doctor.configuration(config(tmp_path), ["run.max_itres=3"])
    assert "did you mean 'max_iters'" in fault.text
    assert others[0].text.startswith("model.language_model.weights")
    [fault] = doctor.configuration(config(tmp_path, "no_such_type"), [])
    assert "no_such_type" in fault.text


def test_an_earlier_training_in_the_folder_is_a_fault(tmp_path):
    (tmp_path / "out" / "checkpoints" / "step_00000003").mkdir(parents=True)
    for more, levels in ((["run.job_id=''"], ["FAULT"]), (["run.job_id=''", "run.overwrite=true"], []), ([], [])):
        found = doctor.configuration(config(tmp_path), [f"run.output_dir={tmp_path / 'out'}", *more])
        assert [level for level, text in found if "of an earlier training" in text] == levels


PUBLISHED = {
    "vicuna13b": {
        "language_model": {
            "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40,
        },
    },
    "qwen3_8b": {
        "language_model": {
            "model_type": "qwen3", "intermediate_size": 12_288, "num_hidden_layers": 36, "num_key_value_heads": 8,
        },
        "vision": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
        },
        "audio": {
            "model_type": "whisper", "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120, "num_mel_bins": 128, "decoder_attention_heads": 20,
        },
    },
}  # fmt: skip
"""Type -> published sizes of its parts, where they differ from the defaults of transformers."""


@pytest.mark.parametrize(
    ("model_type", "batch", "checkpointing", "gib", "millions"),
    [("qwen3_8b", 16, True, 32, (8190.7, 428.2, 637.0)), ("vicuna13b", 32, False, 80, (13015.9, 985.9, 90.3))],
)
def test_shipped_types_have_published_sizes_and_fit(model_type, batch, checkpointing, gib, millions, monkeypatch):
    """The batches are those of projects/chatbridge/TYPE/align.yaml."""
    monkeypatch.setattr("lavis_chatbridge.models.settings.slow_on_cpu", lambda dtype: False)
    values = model_settings(model_type).model_dump()
    values["language_model"]["tokenizer"] = "t"
    for part in ("language_model", "vision", "audio"):
        values[part]["weights"] = None
        values[part]["config"] = PUBLISHED[model_type].get(part, values[part]["config"])
    parts = training_memory(parse(ModelSettings, values, "model"), batch, checkpointing)
    found = [parts[part] / 2e6 for part in ("language model", "vision encoder", "audio encoder")]
    assert found == pytest.approx(millions, abs=0.1)
    assert (gib - 10) * 2**30 < sum(parts.values()) < gib * 2**30
