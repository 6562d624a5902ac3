"""What a step draws, and the gradients that it gives its optimiser: of the mean over its tokens, clipped if asked."""

from __future__ import annotations

import math

import pytest
import torch

from lavis_chatbridge.runners import gradients
from tests.runners.runner_parts import ToyModel, runner


class Keeping(ToyModel):
    """Keeps the samples of every micro-batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, samples):
        self.seen.append(samples)
        return super().forward(samples)


def handed_over(folder, **run):
    """The micro-batches of a first step, and the gradients by name that its optimiser is given."""
    one = runner(folder, Keeping(), max_iters=1, **run)
    found, step = {}, one.optimizer.step

    def look(*arguments, **more):
        found.update({name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None})
        return step(*arguments, **more)

    one.optimizer.step = look
    one.train()
    return one.model.seen, found


def of_the_mean(batches):
    """Gradients of the mean loss over the target tokens of all batches together, and their norm."""
    model = ToyModel()
    tokens = sum(len(words) for samples in batches for words in samples["target"])
    for samples in batches:
        out = model(samples)
        (out["loss"] * out["target_tokens"] / tokens).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, math.sqrt(sum(float(grad.square().sum()) for grad in found.values()))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("limit", "clipped"), [(None, False), (100.0, False), (0.01, True)])
def test_a_step_has_the_gradients_of_the_mean_over_its_tokens(tmp_path, accumulate, limit, clipped):
    batches, found = handed_over(tmp_path, accum_grad_iters=accumulate, clip_grad_norm=limit)
    assert len(batches) == accumulate
    expected, norm = of_the_mean(batches)
    assert 0.01 < norm < 100
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad * (limit / norm if clipped else 1), rtol=1e-4, atol=1e-7)


def test_norm_scale_and_clip_by_hand():
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert gradients.norm(grads) == 5.0
    assert gradients.norm([]) == 0.0
    gradients.clip(grads, 5.0, 2.5)
    assert [grad.flatten().tolist() for grad in grads] == [[1.5, 0.0], [2.0]]
    for total, limit in ((2.5, 3.0), (2.5, None), (math.inf, 1.0)):
        gradients.clip(grads, total, limit)
    assert [grad.flatten().tolist() for grad in grads] == [[1.5, 0.0], [2.0]]
    gradients.scale(grads, 2.0)
    assert grads[0].tolist() == [3.0, 0.0]
    assert not math.isfinite(gradients.norm([torch.tensor([1.0]), torch.tensor([float("nan")])]))


def test_parameters_without_a_gradient_are_left_out():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    assert gradients.of([used, unused]) == [used.grad]


class Drawing(ToyModel):
    """Keeps what chance gives it in each pass."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, samples):
        self.drawn.append(torch.rand(1).item())
        return super().forward(samples)


def test_every_step_draws_anew_and_as_its_seed_says(tmp_path):
    found = []
    for number, seed in enumerate((1, 1, 2)):
        one = runner(tmp_path / str(number), Drawing(), max_iters=3, seed=seed)
        one.train()
        found.append(one.model.drawn)
    assert len(set(found[0])) == 3
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])
