"""Resuming with changed options, and from checkpoints named in other ways: what a run goes on with, and where."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from lavis_chatbridge.datasets.plan import MixturePlan
from lavis_chatbridge.errors import ConfigError, TrainingError
from tests.runners.runner_parts import ToyGroup, ToySource, runner


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("_")[2]) for path in (folder / "checkpoints").glob("step_*"))


def test_passes_over_the_data_are_whole_although_the_batch_changes(tmp_path):
    """40 samples: 10 steps of 4 are a pass; after 5 of the 20 steps of two passes, batches of 2 need 30 more."""
    part = runner(tmp_path, max_iters=None, max_epoch=2, save_every_steps=5, keep_last=9)
    part.state.check = lambda run: (_ for _ in ()).throw(TrainingError("cut")) if part.state.step == 5 else None
    with pytest.raises(TrainingError, match="cut"):
        part.train()
    resumed = runner(tmp_path, max_iters=None, max_epoch=2, batch_size_train=2, resume="auto")
    resumed.train()
    assert resumed.state.step == 5 + 30
    assert sum(resumed.train_loader.plan.positions(35).values()) == 80


@pytest.mark.parametrize("before", ["fp32", "bf16"])
def test_fp16_goes_on_from_another_precision(tmp_path, before):
    runner(tmp_path, max_iters=2, precision=before).train()
    resumed = runner(tmp_path, max_iters=4, precision="fp16", resume="auto")
    resumed.train()
    assert resumed.state.step == 4


@pytest.mark.parametrize("way", ["link to the checkpoint", "link to the folder"])
def test_going_back_by_another_name_keeps_later_checkpoints_apart(tmp_path, way):
    options = {"max_iters": 8, "save_every_steps": 2, "keep_last": 2}
    runner(tmp_path / "r", **options | {"keep_last": 9}).train()
    if way == "link to the checkpoint":
        named = tmp_path / "latest"
        named.symlink_to(tmp_path / "r" / "checkpoints" / "step_00000004")
    else:
        (tmp_path / "link").symlink_to(tmp_path / "r")
        named = tmp_path / "link" / "checkpoints" / "step_00000004"
    resumed = runner(tmp_path / "r", resume=str(named), **options)
    resumed.train()
    assert steps(tmp_path / "r") == [6, 8]
    assert sorted(p.name for p in (tmp_path / "r" / "earlier" / "1" / "checkpoints").iterdir()) == [
        "step_00000006",
        "step_00000008",
    ]


def test_best_weights_are_nothing_to_go_on_from(tmp_path):
    runner(tmp_path, max_iters=4, eval_every=2, valid_splits=["val"]).train()
    (best,) = (tmp_path / "checkpoints").glob("best_*")
    with pytest.raises(ConfigError, match="weights alone, without optimiser"):
        runner(tmp_path, max_iters=6, resume=str(best)).train()


def test_a_runs_folder_is_no_checkpoint_and_its_newest_is_named(tmp_path):
    runner(tmp_path, max_iters=2).train()
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(
            ConfigError, match=r"is no checkpoint; the newest one in it is .*checkpoints/step_00000002$"
        ):
            runner(tmp_path, max_iters=4, resume=str(folder)).train()


def test_a_run_with_a_name_does_not_take_over_another_ones(tmp_path):
    runner(tmp_path, job_id="slow", init_lr=0.01, max_iters=2).train()
    runner(tmp_path, job_id="fast", init_lr=0.05, max_iters=2, resume="auto").train()
    assert steps(tmp_path / "slow") == steps(tmp_path / "fast") == [2]
    for name in ("slow", "fast"):
        resumed = runner(tmp_path, job_id=name, init_lr=0.02, max_iters=3, resume="auto")
        assert resumed.output_dir == tmp_path / name


def test_a_run_with_a_new_name_goes_on_with_what_was_configured_alike(tmp_path):
    """As a script with ``run.job_id=$SLURM_JOB_ID`` that is handed in again; how often it writes may differ."""
    runner(tmp_path, job_id="17", init_lr=0.01, max_iters=2).train()
    again = runner(tmp_path, job_id="18", init_lr=0.01, max_iters=2, log_every=1, resume="auto")
    assert again.continued == tmp_path / "17" / "checkpoints" / "step_00000002"
    other = runner(tmp_path, job_id="18", init_lr=0.02, max_iters=2, resume="auto")
    assert (other.continued, other.output_dir) == (None, tmp_path / "18")


def test_samples_sorted_by_length_are_taken_once_each_although_the_plan_changes():
    """Within a window of sorted batches, twice in a row, at its border, and with the sorting switched off and on."""
    sizes = {"a": 61, "b": 45}
    rng = np.random.default_rng(0)
    lengths = {name: rng.integers(1, 50, size) for name, size in sizes.items()}
    taken: dict[str, list] = {"a": [], "b": []}
    step, positions, left = 0, dict.fromkeys(sizes, 0), {}
    for steps, batch, world, sorted_ in (
        (7, 3, 2, 1),
        (1, 2, 1, 1),
        (9, 1, 3, 1),
        (3, 4, 1, 0),
        (5, 2, 2, 1),
        (60, 3, 2, 1),
    ):
        plan = MixturePlan(sizes, None, batch, world, 5, lengths if sorted_ else None, group=4)
        plan.go_on_from(step, positions, left)
        for now in range(step, step + steps):
            for rank in range(world):
                name, pairs = plan.batch(now, rank)
                taken[name] += pairs
        step += steps
        positions, left = plan.positions(step), plan.left(step)
    for name, size in sizes.items():
        assert len(taken[name]) == len(set(taken[name])) == positions[name] > 3 * size
        assert {pair for pair in taken[name] if pair[1] < 2} == {(i, epoch) for i in range(size) for epoch in (0, 1)}


class Sorted(ToySource):
    """A source whose samples are put together by length; notes what was taken."""

    taken: ClassVar[list[tuple[int, int]]] = []

    def drawn_tokens(self, indices, _epochs):
        return np.zeros(len(indices), dtype=int)

    def item(self, index, epoch=0):
        self.taken.append((index, epoch))
        return super().item(index, epoch)


def test_a_run_that_sorts_by_length_goes_on_in_batches_of_another_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Sorted, "taken", [])
    data = {"pictures": {"train": ToyGroup([Sorted("pictures", "image", 300)])}}
    for steps, batch in ((5, 4), (7, 2), (9, 8), (105, 3)):
        options = {"max_iters": steps, "batch_size_train": batch, "group_by_length": True, "resume": "auto"}
        runner(tmp_path, data=data, **options).train()
    assert len(Sorted.taken) == len(set(Sorted.taken)) == 5 * 4 + 2 * 2 + 2 * 8 + 96 * 3
    assert sum(epoch == 0 for _, epoch in Sorted.taken) == 300
