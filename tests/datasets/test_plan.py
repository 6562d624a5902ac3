"""The mixture plan: exact epochs, exact shares, and the same samples however they are divided or resumed."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from lavis_chatbridge.datasets import plan as plans
from lavis_chatbridge.datasets.plan import KeyedPermutation, MixturePlan
from lavis_chatbridge.errors import ConfigError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65_537])
def test_permutation_hits_every_element_once(size):
    assert sorted(KeyedPermutation(size, 7, 1)(np.arange(size))) == list(range(size))


def test_order_is_pinned_across_versions():
    plan = MixturePlan({"a": 100, "b": 50}, batch_size=4, seed=3)
    assert [plan.batch(step) for step in range(3)] == [
        ("a", [(57, 0), (55, 0), (14, 0), (39, 0)]),
        ("b", [(10, 0), (45, 0), (30, 0), (31, 0)]),
        ("a", [(12, 0), (32, 0), (90, 0), (27, 0)]),
    ]


@pytest.mark.parametrize("lengths", [False, True])
def test_ranks_together_see_what_one_rank_sees_and_steps_come_in_any_order(lengths):
    sizes = {"a": 97, "b": 97, "c": 5}
    arrays = {name: np.arange(size) * 7 % 19 for name, size in sizes.items()} if lengths else None
    one = MixturePlan(sizes, batch_size=12, world_size=1, seed=5, lengths=arrays, group=4)
    four = MixturePlan(sizes, batch_size=3, world_size=4, seed=5, lengths=arrays, group=4)
    whole = [one.batch(step) for step in range(60)]
    assert {name for name, _ in whole} == {"a", "b", "c"}
    for step in reversed(range(60)):
        parts = [four.batch(step, rank) for rank in range(4)]
        assert {part[0] for part in parts} == {whole[step][0]}
        assert all(len(part[1]) == 3 for part in parts)
        assert sorted(pair for part in parts for pair in part[1]) == sorted(whole[step][1])


@pytest.mark.parametrize("ratios", [(1, 1, 1), (0.7, 0.29, 0.01), (2, 3, 1e-4)])
def test_steps_follow_the_ratios(ratios):
    plan = MixturePlan(dict.fromkeys("abc", 10), dict(zip("abc", ratios, strict=True)), seed=2)
    counts = Counter(plan.batch(step)[0] for step in range(20_000))
    for name, ratio in zip("abc", ratios, strict=True):
        assert abs(counts[name] - 20_000 * ratio / sum(ratios)) <= 3
    if ratios == (1, 1, 1):
        blocks = {tuple(plan.batch(step)[0] for step in range(3 * n, 3 * n + 3)) for n in range(50)}
        assert {tuple(sorted(block)) for block in blocks} == {("a", "b", "c")}
        assert len(blocks) == 6


def test_grouping_by_length_reduces_padding():
    lengths = np.random.default_rng(0).integers(5, 200, 4000)
    plain = MixturePlan({"a": 4000}, batch_size=16)
    grouped = MixturePlan({"a": 4000}, batch_size=16, lengths={"a": lengths})

    def padded(plan):
        batches = [lengths[[index for index, _ in plan.batch(step)[1]]] for step in range(250)]
        return sum(len(batch) * batch.max() - batch.sum() for batch in batches)

    assert padded(grouped) < 0.15 * padded(plain)


@pytest.mark.parametrize(("step", "batch", "ranks"), [(40, 2, 3), (40, 5, 1), (41, 3, 2)])
def test_a_plan_of_other_sizes_resumes_after_the_same_samples(step, batch, ranks):
    sizes, whole = {"a": 70, "b": 30}, MixturePlan({"a": 70, "b": 30}, batch_size=6, seed=8)
    seen = Counter((whole.batch(s)[0], pair) for s in range(step) for pair in whole.batch(s)[1])
    other = MixturePlan(sizes, batch_size=batch, world_size=ranks, seed=8)
    other.resume(step, whole.positions(step))
    for s in range(step, step + 120):
        seen.update((other.batch(s, r)[0], pair) for r in range(ranks) for pair in other.batch(s, r)[1])
    assert set(seen.values()) == {1}  # each sample once per epoch
    assert all((name, (i, 2)) in seen for name in ("a", "b") for i in range(sizes[name]))
    first, second = ([index for name, (index, epoch) in seen if (name, epoch) == ("a", number)] for number in (0, 1))
    assert first != second
    assert other.positions(step) == whole.positions(step)
    assert other.steps_of(9) == step + -(-(900 - step * 6) // (batch * ranks))


def test_sorted_by_length_a_plan_of_other_sizes_resumes_at_the_next_window():
    lengths = {"a": np.arange(640) * 7 % 19}
    first = MixturePlan({"a": 640}, batch_size=4, seed=5, lengths=lengths, group=8)
    assert [first.positions(step)["a"] for step in (0, 1, 8, 9)] == [0, 32, 32, 64]
    other = MixturePlan({"a": 640}, batch_size=8, seed=5, lengths=lengths, group=8)
    other.resume(9, first.positions(9))
    seen = [pair for step in range(9) for pair in first.batch(step)[1]]
    seen += [pair for step in range(9, 81) for pair in other.batch(step)[1]]
    assert len(set(seen)) == len(seen)


def test_a_thousand_ranks_and_130_million_samples_cost_nothing(monkeypatch):
    """Neither memory, nor work that grows with the step."""
    sizes = {f"s{i}": 130_000_000 // 8 + i for i in range(8)}
    worked = Counter()
    for name, real in (("_hash", plans._hash), ("_mix", plans._mix)):
        monkeypatch.setattr(plans, name, lambda *a, n=name, real=real: worked.update([n]) or real(*a))
    tracemalloc.start()
    try:
        plan = MixturePlan(sizes, batch_size=32, world_size=1024, seed=4)
        batches = [plan.batch(10_000_000, rank) for rank in (0, 511, 1023)]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert sum(worked.values()) < 1000
    assert len({name for name, _ in batches}) == 1
    assert len({pair for _, pairs in batches for pair in pairs}) == 96
    assert plan.steps_per_epoch() == -(-sum(sizes.values()) // (32 * 1024))


def test_ratios_name_every_source():
    with pytest.raises(ConfigError, match="a ratio for each of a, found"):
        MixturePlan({"a": 1}, {"b": 1})
