"""Checkpoints: a resumed run equals an uninterrupted one bit for bit; what does not fit is refused."""

from __future__ import annotations

import copy
import os
import resource
import signal

import pytest
import torch

from lavis_chatbridge.errors import CheckpointError, TrainingError
from lavis_chatbridge.runners import checkpoints
from lavis_chatbridge.runners.checkpoints import STATE
from tests.runners.runner_parts import Stop, ToyModel, after_step, logged, runner, same, weights


@pytest.mark.parametrize(
    "options",
    [
        {"save_every_steps": 4},
        {"save_every_steps": 2, "num_workers": 2, "accum_grad_iters": 2},
        {"precision": "fp16", "eval_every": 3, "valid_splits": ["val"], "init_lr": 0.5},
        {"save_every_steps": 2, "train": ["bridge"], "group_by_length": True},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, options):
    options = {"max_iters": 14, **options}
    whole = runner(tmp_path / "whole", ToyModel(0.3), **options)
    whole.train()
    part = runner(tmp_path / "cut", ToyModel(0.3), **options)
    after_step(part, 7)
    with pytest.raises(Stop):
        part.train()
    resumed = runner(tmp_path / "cut", ToyModel(0.3), **options | {"resume": "auto", "num_workers": 0})
    resumed.train()
    assert same(weights(whole), weights(resumed))
    assert resumed.state == whole.state
    first, second = (checkpoints.optimizer_tensors(one.model, one.train_step.optimizer) for one in (whole, resumed))
    assert same(first, second)
    for key in ("train_step", "val_step", "val_best_step"):
        assert logged(tmp_path / "cut", key) == logged(tmp_path / "whole", key)


@pytest.mark.parametrize("cut", ["in the validation", "by SIGTERM at its step"])
def test_a_run_that_ends_around_a_validation_resumes_exactly(tmp_path, cut):
    """The validation is repeated, or made up for."""
    options = {"max_iters": 8, "eval_every": 2, "valid_splits": ["val"], "log_every": 1, "init_lr": 0.5}
    whole = runner(tmp_path / "whole", ToyModel(0.3), **options)
    whole.train()
    part = runner(tmp_path / "cut", ToyModel(0.3), **options)
    if cut == "in the validation":
        score = part.eval_epoch

        def ends(split, step):
            if step == 4:
                raise SystemExit(143)
            return score(split, step)

        part.eval_epoch = ends
    else:
        after_step(part, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        part.train()
    resumed = runner(tmp_path / "cut", ToyModel(0.3), resume="auto", **options)
    assert resumed.folder.resumed.name == ("step_00000002" if cut == "in the validation" else "step_00000004")
    resumed.train()
    assert same(weights(whole), weights(resumed))
    assert resumed.state == whole.state
    for key in ("train_step", "train_loss", "val_step", "val_loss", "val_best_step"):
        assert logged(tmp_path / "cut", key) == logged(tmp_path / "whole", key)


def test_a_finished_run_resumes_without_steps_and_a_later_or_damaged_checkpoint_is_refused(tmp_path, caplog):
    runner(tmp_path).train()
    caplog.set_level("INFO")
    again = runner(tmp_path, resume="auto")
    again.train()
    assert again.state.step == 8
    assert "after step 8; 0 steps are left" in caplog.text
    with pytest.raises(CheckpointError, match=r"is of step 8, but this run ends at step 6: raise run.max_iters"):
        runner(tmp_path, max_iters=6, resume="auto").train()
    (again.folder.checkpoints / "step_00000008" / STATE).write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"cannot be read: .*scaler is missing.* set run.resume to an earlier one"
    ):
        runner(tmp_path, resume="auto").train()


def test_a_full_disk_ends_the_run_with_the_cause_and_the_last_good_checkpoints(tmp_path):
    one = runner(tmp_path, max_iters=9, save_every_steps=1, keep_last=2)
    one.train()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    one.state.step = 10
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*File too large.*older checkpoints are intact"):
            one._save_checkpoint(10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000008", "step_00000009"}


class Words(tuple):
    def decode(self, ids):
        return self[ids[0]]


def test_frozen_hashes_ignore_precision_and_notice_changes_of_weights_and_vocabulary():
    model = torch.nn.ModuleDict({"large": torch.nn.Linear(100, 100)})
    hashes = [checkpoints.frozen_hashes(model, [])]
    assert checkpoints.frozen_hashes(copy.deepcopy(model).bfloat16(), []) == hashes[0]
    for place in ((0, 0), (99, 99)):
        with torch.no_grad():
            model["large"].weight[place] += 1
        hashes.append(checkpoints.frozen_hashes(model, []))
    for words in (("a", "b"), ("a", "c")):
        model.llama_tokenizer = Words(words)
        hashes.append(checkpoints.frozen_hashes(model, []))
    assert len({str(found) for found in hashes}) == 5
    assert hashes[-1]["large"] == hashes[-2]["large"]


def test_passes_over_the_data_are_complete_although_the_batch_changes(tmp_path):
    """40 samples: 10 steps of 4 are a pass; after 5 of the 20 steps of two passes, batches of 2 need 30 more."""
    part = runner(tmp_path, max_iters=None, max_epoch=2, save_every_steps=5, keep_last=9)
    after_step(part, 6)
    with pytest.raises(Stop):
        part.train()
    resumed = runner(tmp_path, max_iters=None, max_epoch=2, batch_size_train=2, resume="auto")
    resumed.train()
    assert resumed.state.step == 5 + 30
    assert sum(resumed.train_loader.plan.positions(35).values()) == 80


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a finished run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    runner(folder, max_iters=2).train()
    return folder / "checkpoints" / "step_00000002"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda saved: saved.weights.pop("norm.bias"), "does not fit this model: missing: norm.bias"),
        (
            lambda saved: saved.optimizer.update({"norm.bias|exp_avg": torch.ones(3)}),
            r"exp_avg is \[3\], expected \[8\]",
        ),
        (lambda saved: saved.state.plan.data["sizes"].update(sounds=99), "other data: sizes is .*99"),
        (lambda saved: saved.state.frozen.update(frozen="x"), "frozen is x, expected"),
    ],
)
def test_what_is_refused_leaves_the_run_as_it_was(tmp_path, trained, monkeypatch, damage, message):
    one, saved = runner(tmp_path, max_iters=6, resume=str(trained)), checkpoints.read(trained)
    before, progress = copy.deepcopy(one.model.state_dict()), copy.deepcopy(one.state)
    damage(saved)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "read", lambda folder: saved)
        with pytest.raises(CheckpointError, match=message):
            one.train()
    assert same(one.model.state_dict(), before)
    assert (one.state, one.train_step.optimizer.state, one.train_loader.plan.origin[0]) == (progress, {}, 0)
    one.train()
    assert one.state.step == 6
