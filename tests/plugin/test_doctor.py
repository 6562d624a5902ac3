"""``chatbridge doctor``: what stops a run is a fault with its remedy, what is well is said, the exit status follows."""

from __future__ import annotations

import sys

import pytest

from lavis_chatbridge import cli
from lavis_chatbridge.plugin import doctor
from lavis_chatbridge.plugin.doctor import Finding

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
