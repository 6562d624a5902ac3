"""From media to query vectors: frozen encoders over all frames or clips of a batch, then the shared perceiver.

Shapes: ``B`` media, ``T`` frames or clips of a medium, ``N`` tokens of each, ``D`` width; ``F`` frames of a filterbank,
``M`` mel bins; ``Q`` queries, ``W`` width of the perceiver.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.media.source import AudioClips, EncodedMedium
from lavis_chatbridge.models.encoders import AudioEncoder, VisionEncoder
from lavis_chatbridge.models.settings import PerceiverSettings


def own_precision(part: Any) -> AbstractContextManager:
    """Switches autocast off for a frozen part (a model or tensor) in half precision; parts in fp32 follow autocast."""
    return nullcontext() if part.dtype == torch.float32 else torch.autocast(part.device.type, enabled=False)


@torch.no_grad()
def encode_frames(encoder: VisionEncoder, norm: nn.Module, media: Sequence[Tensor], chunk: int) -> list[EncodedMedium]:
    """Encode images ``[3, H, W]`` and videos ``[T, 3, H, W]`` with the vision encoder and its layer norm.

    At most ``chunk`` frames are encoded at once.
    """
    frames = [medium.unsqueeze(0) if medium.dim() == 3 else medium for medium in media]
    for medium in frames:
        if tuple(medium.shape[1:]) != tuple(encoder.frame_shape) or not len(medium):
            raise ConfigError(
                f"the vision encoder needs frames of shape {list(encoder.frame_shape)}, found "
                f"{list(medium.shape[1:])}: make model.vision.image_size and the image processors' image_size equal"
            )
    return _encoded(encoder, norm, frames, None, chunk)


@torch.no_grad()
def encode_clips(
    encoder: AudioEncoder, norm: nn.Module, media: Sequence[Tensor | AudioClips], chunk: int, mask_padding: bool
) -> list[EncodedMedium]:
    """Encode sounds of clips ``[T, F, ...]`` with the audio encoder and its layer norm, ``chunk`` clips at once.

    ``mask_padding`` masks the frames after ``AudioClips.frames``. A plain tensor counts as unpadded, and its incomplete
    last patch is cut off.
    """
    patch, axis = encoder.patch, encoder.time_axis
    clips, lengths = [], []
    for medium in media:
        if isinstance(medium, AudioClips) and mask_padding:
            clips.append(medium.fbank)
            lengths.append(torch.as_tensor(medium.frames))
        else:
            clip = medium.fbank if isinstance(medium, AudioClips) else medium
            complete = clip.shape[axis] // patch * patch
            clips.append(clip.narrow(axis, 0, complete))
            lengths.append(torch.full((len(clip),), complete))
    if len(others := {(*clip.shape[1:axis], *clip.shape[axis + 1 :]) for clip in clips}) > 1:
        raise ConfigError(f"sounds of one batch have different mel bins: {sorted(others)}")
    patches = [-(-clip.shape[axis] // patch) for clip in clips]
    longest = max(patches) * patch
    behind = (0, 0) * (clips[0].dim() - 1 - axis)
    padded = [functional.pad(clip, (*behind, 0, longest - clip.shape[axis])) for clip in clips]
    frames = torch.cat(lengths)
    encoded = _encoded(encoder, norm, padded, None if bool((frames >= longest).all()) else frames, chunk)
    own = [-(-count * patch * one.mask.shape[1] // longest) for count, one in zip(patches, encoded, strict=True)]
    return [EncodedMedium(one.tokens[:, :n], one.mask[:, :n]) for one, n in zip(encoded, own, strict=True)]


def _encoded(
    encoder: Any, norm: nn.Module, media: Sequence[Tensor], lengths: Tensor | None, chunk: int
) -> list[EncodedMedium]:
    """Encode media of equal shape; tokens are normalised and in fp32."""
    weight = next(encoder.parameters())
    flat = torch.cat([medium.to(weight.device, weight.dtype, non_blocking=True) for medium in media]).split(chunk)
    parts = [None] * len(flat) if lengths is None else lengths.to(weight.device).split(chunk)
    tokens, masks = [], []
    with own_precision(weight):
        for batch, length in zip(flat, parts, strict=True):
            encoded, mask = encoder.encode(batch, length)
            with torch.autocast(weight.device.type, enabled=False):
                tokens.append(norm(encoded.float()))
            masks.append(mask)
    counts = [len(medium) for medium in media]
    pairs = zip(torch.cat(tokens).split(counts), torch.cat(masks).split(counts), strict=True)
    return [EncodedMedium(*pair) for pair in pairs]


def stack(media: Sequence[EncodedMedium], device: torch.device) -> tuple[Tensor, Tensor | None, list[int]]:
    """``[B, T, N, D]`` padded tokens in fp32, ``[B, T, N]`` mask (None without padding), and each medium's ``T``."""
    counts = [medium.tokens.shape[0] for medium in media]
    steps, tokens = max(counts), max(medium.tokens.shape[1] for medium in media)
    features, masks = [], []
    for medium in media:
        missing = (0, tokens - medium.tokens.shape[1], 0, steps - medium.tokens.shape[0])
        features.append(functional.pad(medium.tokens.to(device).float(), (0, 0, *missing)))
        masks.append(functional.pad(medium.mask.to(device), missing))
    mask = torch.stack(masks)
    return torch.stack(features), None if bool(mask.all()) else mask, counts


def positions_in_time(table: Tensor, counts: Sequence[int]) -> Tensor:
    """``[B, T, 1, D]`` temporal position embeddings of each medium's ``T``; zeros after a medium's end.

    Up to ``n`` frames or clips get the first entries of the learnt ``[1, n, 1, D]`` table; for more, the table is
    interpolated to their number.
    """
    return nn.utils.rnn.pad_sequence([_interpolated(table[0], count) for count in counts], batch_first=True)


def _interpolated(table: Tensor, count: int) -> Tensor:
    """``[T, 1, D]`` of ``[n, 1, D]``."""
    if count <= len(table):
        return table[:count]
    line = table.permute(1, 2, 0)
    line = functional.interpolate(line, size=count, mode="linear", align_corners=len(table) > 1)
    return line.permute(2, 0, 1)


def build_perceiver(config: PerceiverSettings, encoder_width: int) -> nn.Module:
    """LAVIS's Q-Former with random weights and, as in BLIP-2, only the query branch; it downloads nothing.

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
    hidden = perceiver.bert.embeddings(query_embeds=queries.expand(len(features), -1, -1))
    blocked = None  # added to the scores of attention
    if mask is not None:
        lowest = torch.finfo(queries.dtype).min
        blocked = torch.zeros_like(mask, dtype=queries.dtype).masked_fill(~mask, lowest)[:, None, None]
    return perceiver.bert.encoder(
        hidden, encoder_hidden_states=features, encoder_attention_mask=blocked, query_length=queries.shape[1]
    ).last_hidden_state
