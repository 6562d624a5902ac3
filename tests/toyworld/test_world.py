"""The embedded world's truth: every pair of values stays in training, held-out triples never do."""

from __future__ import annotations

import itertools

import pytest

from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.toyworld.world import ATTRIBUTES, TRIPLES, all_scenes


@pytest.mark.parametrize("kind", MODALITIES)
def test_held_out_triples_leave_every_pair_in_training(kind: Modality) -> None:
    seen = [scene.facts for scene in all_scenes(kind) if not scene.held_out]
    assert 0.08 <= 1 - len(seen) / len(all_scenes(kind)) <= 0.15
    for first, second in itertools.combinations(TRIPLES[kind], 2):
        pairs = {(facts[first], facts[second]) for facts in seen}
        assert len(pairs) == len(ATTRIBUTES[kind][first]) * len(ATTRIBUTES[kind][second])
