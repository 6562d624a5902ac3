"""BEATs: padding without influence, the bucket rule, names and configurations; its numbers are in test_golden."""

from __future__ import annotations

import pytest
import torch

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.encoders.beats import Beats, relative_buckets
from lavis_chatbridge.models.settings import BeatsConfig
from tests.models.building import SMALL_BEATS


@pytest.fixture
def beats() -> Beats:
    torch.manual_seed(0)
    return Beats(SMALL_BEATS).eval()


@pytest.mark.parametrize("frames", [1, 16, 75, 80])
def test_padding_changes_nothing(beats: Beats, frames: int) -> None:
    fbank = torch.randn(2, 160, 32)
    lengths = torch.tensor([frames, 160])
    tokens, mask = beats(fbank, lengths)
    alone, mask_alone = beats(fbank[:1, :frames], lengths[:1])
    assert mask_alone.all()
    assert mask.sum(1).tolist() == [-(-frames // 16) * 2, 20]
    torch.testing.assert_close(tokens[0, mask[0]], alone[0], atol=1e-5, rtol=0)
    assert not tokens[0, ~mask[0]].any()


def test_a_clip_without_sound_still_has_a_patch_to_look_at(beats: Beats) -> None:
    tokens, mask = beats(torch.randn(2, 64, 32), torch.tensor([0, 64]))
    assert mask.sum(1).tolist() == [2, 8]
    assert tokens.isfinite().all()


def test_without_frames_a_rest_is_dropped(beats: Beats) -> None:
    fbank = torch.randn(1, 90, 32)
    tokens, mask = beats(fbank)
    assert tokens.shape == (1, 10, 32)
    assert mask.all()
    torch.testing.assert_close(tokens, beats(fbank[:, :80])[0])


def test_buckets_by_hand() -> None:
    buckets = relative_buckets(torch.tensor([-3, 0, 3, 4, 40, 1000, -1000]), num_buckets=16, max_distance=40)
    assert buckets.tolist() == [3, 0, 11, 12, 15, 15, 7]


def test_one_bias_table_under_every_layers_name(beats: Beats) -> None:
    names = [name for name in beats.state_dict() if name.endswith("relative_attention_bias.weight")]
    assert names == [f"encoder.layers.{i}.self_attn.relative_attention_bias.weight" for i in range(2)]
    assert sum(name.endswith("relative_attention_bias.weight") for name, _ in beats.named_parameters()) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_norm_first": True}, "layer_norm_first=True is not supported"),
        ({"gru_rel_pos": False}, "gru_rel_pos=False is not supported, only gru_rel_pos=True"),
        ({"encoder_attention_heads": 5}, "not a multiple of encoder_attention_heads 5"),
        ({"conv_pos_groups": 5}, "conv_pos_groups 5"),
    ],
)
def test_refused_configurations(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BeatsConfig.from_dict({**vars(SMALL_BEATS), **change})


def test_bins_that_do_not_fit_are_named(beats: Beats) -> None:
    with pytest.raises(ConfigError, match="multiples of 16 and at least 16 frames, found 40 bins and 64 frames"):
        beats(torch.zeros(1, 64, 40))
