"""One step: its gradients, its random numbers, its learning rate, and the optimiser's parameter groups."""

from __future__ import annotations

import math

import pytest
import torch

from lavis_chatbridge.runners.step import adamw, learning_rate
from tests.runners.runner_parts import ToyModel, config, runner


class Keeping(ToyModel):
    """Keeps the samples of every micro-batch, and a random number of each forward."""

    def __init__(self):
        super().__init__()
        self.seen, self.drawn = [], []

    def forward(self, samples):
        self.seen.append(samples)
        self.drawn.append(torch.rand(1).item())
        return super().forward(samples)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("limit", "clipped"), [(None, False), (100.0, False), (0.01, True)])
def test_a_step_has_the_gradients_of_the_mean_over_its_tokens(tmp_path, accumulate, limit, clipped):
    one = runner(tmp_path, Keeping(), max_iters=1, accum_grad_iters=accumulate, clip_grad_norm=limit)
    found = {}

    def keep(*_):
        found.update({name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None})

    one.train_step.optimizer.register_step_pre_hook(keep)
    one.train()
    batches, model = one.model.seen, ToyModel()
    assert len(batches) == accumulate
    tokens = sum(len(words) for samples in batches for words in samples["target"])
    for samples in batches:
        out = model(samples)
        (out["loss"] * out["target_tokens"] / tokens).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(expected.values()).item()
    assert 0.01 < norm < 100
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad * (limit / norm if clipped else 1), rtol=1e-4, atol=1e-7)


def test_what_a_step_draws_is_a_function_of_seed_and_step(tmp_path):
    found = []
    for number, seed in enumerate((1, 1, 2)):
        one = runner(tmp_path / str(number), Keeping(), max_iters=3, seed=seed)
        one.train()
        found.append(one.model.drawn)
    assert len(set(found[0])) == 3
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


def test_warm_up_then_cosine_over_the_whole_run(tmp_path):
    run = config(tmp_path, max_iters=110, init_lr=1.0, min_lr=0.1, warmup_steps=10, warmup_lr=0.2).run
    found = [learning_rate(run, step, 110) for step in range(110)]
    assert [found[step] for step in (0, 5, 10, 60)] == pytest.approx([0.2, 0.6, 1.0, 0.55])
    assert found[109] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.99)))
    assert found[:11] == sorted(found[:11])
    assert found[10:] == sorted(found[10:], reverse=True)


def test_only_matrices_decay_by_default(tmp_path):
    parameters = list(ToyModel().parameters())
    matrices, vectors = adamw(parameters, config(tmp_path, weight_decay=0.1).run).param_groups
    assert {parameter.ndim for parameter in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    every, none = adamw(parameters, config(tmp_path, decay_all=True).run).param_groups
    assert (len(every["params"]), len(none["params"])) == (len(parameters), 0)
