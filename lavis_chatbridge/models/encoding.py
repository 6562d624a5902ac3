"""Encodes media with the frozen encoders, all frames or clips of a batch at once, and stacks the results.

Shapes: ``B`` media, ``T`` frames or clips of a medium, ``N`` tokens of each, ``D`` width; ``F`` frames of a filterbank,
``M`` mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.media.types import AudioClips, EncodedMedium
from lavis_chatbridge.models.encoders import AudioEncoder, VisionEncoder
from lavis_chatbridge.models.families import own_precision


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
    """Encode sounds with the audio encoder and its layer norm.

    Args:
        encoder: The audio encoder.
        norm: ``ln_audio``.
        media: Clips ``[T, F, ...]``; a plain tensor counts as unpadded, and an incomplete last patch is cut off.
        chunk: Most clips to encode at once.
        mask_padding: Whether to mask the frames after ``AudioClips.frames``.
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
    flat = torch.cat([medium.to(weight.device, weight.dtype, non_blocking=True) for medium in media])
    parts = [None] * len(flat.split(chunk)) if lengths is None else lengths.to(weight.device).split(chunk)
    tokens, masks = [], []
    with own_precision(weight):
        for batch, length in zip(flat.split(chunk), parts, strict=True):
            encoded, mask = encoder.encode(batch, length)
            with torch.autocast(weight.device.type, enabled=False):
                tokens.append(norm(encoded.float()))
            masks.append(mask)
    counts = [len(medium) for medium in media]
    pairs = zip(torch.cat(tokens).split(counts), torch.cat(masks).split(counts), strict=True)
    return [EncodedMedium(*pair) for pair in pairs]


def stack(media: Sequence[EncodedMedium], device: torch.device) -> tuple[Tensor, Tensor | None, list[int]]:
    """Encoded media of one modality, padded to the longest.

    Returns:
        ``[B, T, N, D]`` tokens in fp32, ``[B, T, N]`` mask (None without padding), and each medium's ``T``.
    """
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
    """Temporal position embeddings of each medium's frames or clips.

    Args:
        table: ``[1, n, 1, D]`` learnt positions. Up to ``n`` frames take its first entries; more take positions
            interpolated between its first and last entry.
        counts: Each medium's ``T``.

    Returns:
        ``[B, T, 1, D]``; zeros after a medium's end.
    """
    return torch.nn.utils.rnn.pad_sequence([_interpolated(table[0], count) for count in counts], batch_first=True)


def _interpolated(table: Tensor, count: int) -> Tensor:
    """``[T, 1, D]`` of ``[n, 1, D]``."""
    if count <= len(table):
        return table[:count]
    line = table.permute(1, 2, 0)
    line = functional.interpolate(line, size=count, mode="linear", align_corners=len(table) > 1)
    return line.permute(2, 0, 1)
