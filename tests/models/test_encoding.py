"""Encoded media: stacking with a mask, and positions in time."""

from __future__ import annotations

import torch

from lavis_chatbridge.media.source import EncodedMedium
from lavis_chatbridge.models.encoding import positions_in_time, stack

ENCODED = EncodedMedium(torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))


def test_stacked_media_are_padded_and_masked() -> None:
    long = EncodedMedium(torch.full((2, 3, 4), 2.0).half(), torch.ones(2, 3, dtype=torch.bool))
    features, mask, counts = stack([ENCODED, long], torch.device("cpu"))
    assert features.dtype == torch.float32
    assert counts == [1, 2]
    assert mask is not None
    assert mask.tolist() == [[[True, True, False], [False] * 3], [[True] * 3] * 2]
    assert torch.equal(features[1], long.tokens.float())
    assert not features[0].any()
    assert stack([long, long], torch.device("cpu"))[1] is None


def test_positions_in_time_for_any_length() -> None:
    table = torch.tensor([0.0, 1.0, 4.0]).view(1, 3, 1, 1)
    assert positions_in_time(table, [2]).flatten().tolist() == [0.0, 1.0]
    assert positions_in_time(table, [5]).flatten().tolist() == [0.0, 0.5, 1.0, 2.5, 4.0]
    assert positions_in_time(table, [1, 3])[..., 0, 0].tolist() == [[0.0, 0.0, 0.0], [0.0, 1.0, 4.0]]
    assert positions_in_time(table[:, :1], [4]).flatten().tolist() == [0.0] * 4
