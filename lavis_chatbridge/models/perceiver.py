"""The shared perceiver: LAVIS's Q-Former without its text branch, built from given sizes, without a download.

It turns any number of encoder tokens into a fixed number of query vectors. It knows no modality: the caller passes
queries and tokens.

Shapes: ``B`` media, ``Q`` queries, ``N`` encoder tokens, ``W`` width of the perceiver, ``D`` width of the encoder.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lavis_chatbridge.models.settings import PerceiverSettings


def build_perceiver(config: PerceiverSettings, encoder_width: int) -> nn.Module:
    """LAVIS's Q-Former with random weights and, as in BLIP-2, only the query branch.

    Word and position embeddings, the language-model head and the text branch's feed-forward layers are removed. The
    cross-attention reads tokens of width ``encoder_width``.
    """
    from lavis.models.blip2_models.Qformer import BertLMHeadModel
    from transformers import BertConfig

    bert = BertConfig(
        vocab_size=1,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.feed_forward,
        hidden_act="gelu",
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        layer_norm_eps=config.norm_eps,
        initializer_range=config.initializer_range,
    )
    bert.encoder_width = encoder_width
    bert.add_cross_attention = True
    bert.cross_attention_freq = config.cross_attention_every
    bert.query_length = config.queries
    perceiver = BertLMHeadModel(bert)
    perceiver.cls = None
    perceiver.bert.embeddings.word_embeddings = None
    perceiver.bert.embeddings.position_embeddings = None
    for layer in perceiver.bert.encoder.layer:
        layer.intermediate = None
        layer.output = None
    return perceiver


def perceive(perceiver: Any, queries: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
    """``[B, Q, W]``: ``[1, Q, W]`` queries after reading ``[B, N, D]`` features where the ``[B, N]`` mask is true."""
    return perceiver.bert(
        query_embeds=queries.expand(len(features), -1, -1),
        encoder_hidden_states=features,
        encoder_attention_mask=None if mask is None else mask.long(),
        return_dict=True,
    ).last_hidden_state
