"""BEATs: padding without influence, the bucket rule and configurations; its numbers are in test_golden."""

from __future__ import annotations

import pytest
import torch

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.encoders.beats import Beats
from tests.models.building import SMALL_BEATS


@pytest.fixture
def beats() -> Beats:
    torch.manual_seed(0)
    return Beats(SMALL_BEATS).eval()


@pytest.mark.parametrize("frames", [1, 75, 80])
def test_padding_changes_nothing(beats: Beats, frames: int) -> None:
    fbank = torch.randn(3, 160, 32)
    lengths = torch.tensor([frames, 160, 0])
    tokens, mask = beats(fbank, lengths)
    alone, mask_alone = beats(fbank[:1, :frames], lengths[:1])
    assert mask_alone.all()
    assert mask.sum(1).tolist() == [-(-frames // 16) * 2, 20, 2]  # a clip without sound still has a patch to look at
    torch.testing.assert_close(tokens[0, mask[0]], alone[0], atol=1e-5, rtol=0)
    assert not tokens[0, ~mask[0]].any()
    assert tokens.isfinite().all()


def test_without_frames_a_rest_is_dropped(beats: Beats) -> None:
    fbank = torch.randn(1, 90, 32)
    tokens, mask = beats(fbank)
    assert tokens.shape == (1, 10, 32)
    assert mask.all()
    torch.testing.assert_close(tokens, beats(fbank[:, :80])[0])


def test_bins_that_do_not_fit_are_named(beats: Beats) -> None:
    with pytest.raises(ConfigError, match="multiples of 16 and at least 16 frames, found 40 bins and 64 frames"):
        beats(torch.zeros(1, 64, 40))
