"""LAVIS's models on today's transformers: the attributes that the plugin adds."""

from __future__ import annotations

import torch
from lavis.models.blip2_models.Qformer import BertLMHeadModel
from transformers import BertConfig


def test_laviss_q_former_ignores_masked_tokens() -> None:
    config = BertConfig(vocab_size=5, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    config.encoder_width, config.add_cross_attention = 6, True
    config.cross_attention_freq, config.query_length = 1, 3
    torch.manual_seed(0)
    bert = BertLMHeadModel(config).eval().bert
    queries, features, mask = torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])

    def read(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return bert(
            query_embeds=queries, encoder_hidden_states=features, encoder_attention_mask=mask, return_dict=True
        ).last_hidden_state

    changed = features.clone()
    changed[:, 3] += 1
    before, after = read(features, mask), read(changed, mask)
    torch.testing.assert_close(after[0], before[0], atol=0, rtol=0)
    assert (after[1] - before[1]).abs().max() > 1e-3
    torch.testing.assert_close(read(features, mask[:, None].expand(-1, 3, -1)), before, atol=0, rtol=0)
