"""The embedded world's truth: every pair of values stays in training, held-out triples never do."""

from __future__ import annotations

import itertools

import pytest

from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.toyworld.world import ATTRIBUTES, TRIPLES, all_scenes


@pytest.mark.parametrize("modality", MODALITIES)
def test_held_out_triples_leave_every_pair_in_training(modality: Modality) -> None:
    seen = [scene.facts for scene in all_scenes(modality) if not scene.held_out]
    assert 0.08 <= 1 - len(seen) / len(all_scenes(modality)) <= 0.15
    for first, second in itertools.combinations(TRIPLES[modality], 2):
        pairs = {(facts[first], facts[second]) for facts in seen}
        assert len(pairs) == len(ATTRIBUTES[modality][first]) * len(ATTRIBUTES[modality][second])
