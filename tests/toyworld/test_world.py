"""The embedded world's truth: every pair of values stays in training, held-out triples never do."""

from __future__ import annotations

import itertools

import pytest

from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.toyworld.world import ATTRIBUTES, TRIPLES, all_scenes, scenes


@pytest.mark.parametrize("kind", MODALITIES)
def test_held_out_triples_leave_every_pair_in_training(kind: Modality) -> None:
    seen = [scene.facts for scene in all_scenes(kind) if not scene.held_out]
    assert 0.08 <= 1 - len(seen) / len(all_scenes(kind)) <= 0.15
    for first, second in itertools.combinations(TRIPLES[kind], 2):
        pairs = {(facts[first], facts[second]) for facts in seen}
        assert len(pairs) == len(ATTRIBUTES[kind][first]) * len(ATTRIBUTES[kind][second])


@pytest.mark.parametrize("kind", MODALITIES)
def test_a_round_of_scenes_holds_each_once(kind: Modality) -> None:
    count = sum(scene.held_out for scene in all_scenes(kind))
    drawn = list(itertools.islice(scenes(kind, held_out=True, seed=1), count))
    assert len(set(drawn)) == count
    assert all(scene.held_out for scene in drawn)


def test_order_depends_on_the_seed_only() -> None:
    first = list(itertools.islice(scenes("image", False, 1), 20))
    assert first == list(itertools.islice(scenes("image", False, 1), 20))
    assert first != list(itertools.islice(scenes("image", False, 2), 20))
