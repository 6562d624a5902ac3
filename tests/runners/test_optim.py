"""The learning rate per step, the parameter groups, and the optimiser against the original's."""

from __future__ import annotations

import math

import pytest

from lavis_chatbridge.errors import TrainingError
from lavis_chatbridge.runners import optim
from tests.runners.runner_parts import ToyModel, config


def test_warm_up_then_cosine_over_the_whole_run():
    rates = [optim.learning_rate(step, 110, 1.0, 0.1, 10, 0.2) for step in range(110)]
    assert [rates[step] for step in (0, 5, 10, 60)] == pytest.approx([0.2, 0.6, 1.0, 0.55])
    assert rates[109] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.99)))
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_originals_schedule_takes_its_epoch_from_the_validations(tmp_path):
    options = {"max_iters": 8, "eval_every": 3, "warmup_steps": 4, "init_lr": 0.08, "min_lr": 0.0, "warmup_lr": 0.0}
    rate = optim.schedule(config(tmp_path, lr_sched="original", **options).run, 8, epoch=3)
    rates = [rate(step) for step in range(5)]
    assert rates == pytest.approx([0.0, 0.02, 0.04, 0.0, 0.04])  # half-way, the cosine has come down to a half
    rate = optim.schedule(config(tmp_path, **options).run, 8)
    assert [rate(3), rate(4)] == pytest.approx([0.06, 0.08])


def test_only_matrices_decay_unless_all_shall(tmp_path):
    matrices, vectors = optim.build_optimizer(ToyModel(), config(tmp_path, weight_decay=0.1).run).param_groups
    assert {parameter.ndim for parameter in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    (single,) = optim.build_optimizer(ToyModel(), config(tmp_path, decay_all=True).run).param_groups
    assert len(single["params"]) == len(matrices["params"]) + len(vectors["params"])
    with pytest.raises(TrainingError, match="no trainable parameters"):
        optim.build_optimizer(ToyModel().requires_grad_(False), config(tmp_path).run)
