"""Runs media through the frozen encoders, all frames or clips of a batch at once, and stacks the results.

It knows tensors, no prompts and no files.

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
    """Images and videos through the vision encoder and its layer norm.

    Args:
        encoder: The vision encoder.
        norm: ``ln_vision``.
        media: Images ``[3, H, W]`` or videos ``[T, 3, H, W]``.
        chunk: At most this many frames pass the encoder at once.

    Raises:
        ConfigError: If a frame is not of the encoder's size.
    """
    frames = [medium.unsqueeze(0) if medium.dim() == 3 else medium for medium in media]
    for medium in frames:
        if tuple(medium.shape[1:]) != tuple(encoder.frame_shape) or not len(medium):
            raise ConfigError(
                f"the vision encoder needs frames of shape {list(encoder.frame_shape)}, found "
                f"{list(medium.shape[1:])}: make model.vision.image_size and the image processors' image_size equal"
            )
    tokens, mask = _encoded(encoder, norm, frames, None, chunk)
    counts = [len(medium) for medium in frames]
    return [EncodedMedium(t, m) for t, m in zip(tokens.split(counts), mask.split(counts), strict=True)]


@torch.no_grad()
def encode_clips(
    encoder: AudioEncoder, norm: nn.Module, media: Sequence[Tensor | AudioClips], chunk: int, mask_padding: bool
) -> list[EncodedMedium]:
    """Sounds through the audio encoder and its layer norm.

    Args:
        encoder: The audio encoder.
        norm: ``ln_audio``.
        media: Clips ``[T, F, ...]``; a tensor without ``frames`` holds no padding and loses an incomplete last patch.
        chunk: At most this many clips pass the encoder at once.
        mask_padding: Whether the frames behind ``AudioClips.frames`` are hidden.

    Raises:
        ConfigError: If clips have different mel bins, or do not fit the encoder.
    """
    patch, axis = encoder.patch, encoder.time_axis
    clips, lengths = [], []
    for medium in media:
        clip, frames = (medium.fbank, medium.frames) if isinstance(medium, AudioClips) else (medium, None)
        complete = clip.shape[axis] // patch * patch
        known = frames is not None and mask_padding
        clips.append(clip if known else clip.narrow(axis, 0, complete))
        lengths.append(frames if known else torch.full((len(clip),), complete))
    if len(others := {(*clip.shape[1:axis], *clip.shape[axis + 1 :]) for clip in clips}) > 1:
        raise ConfigError(f"sounds of one batch have different mel bins: {sorted(others)}")
    longest = -(-max(clip.shape[axis] for clip in clips) // patch) * patch
    behind = (0, 0) * (clips[0].dim() - 1 - axis)
    padded = [functional.pad(clip, (*behind, 0, longest - clip.shape[axis])) for clip in clips]
    frames = torch.cat([torch.as_tensor(length) for length in lengths])
    tokens, mask = _encoded(encoder, norm, padded, None if bool((frames >= longest).all()) else frames, chunk)
    counts = [len(clip) for clip in clips]
    own = [-(-(-(-clip.shape[axis] // patch) * patch * tokens.shape[1]) // longest) for clip in clips]
    each = zip(tokens.split(counts), mask.split(counts), own, strict=True)
    return [EncodedMedium(t[:, :n], m[:, :n]) for t, m, n in each]


def _encoded(
    encoder: Any, norm: nn.Module, media: Sequence[Tensor], lengths: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """``[B, N, D]`` normalised tokens in fp32 and ``[B, N]`` mask of all frames or clips, in their order."""
    weight = next(encoder.parameters())
    flat = torch.cat([medium.to(weight.device, weight.dtype, non_blocking=True) for medium in media])
    parts = [None] * len(flat.split(chunk)) if lengths is None else lengths.to(weight.device).split(chunk)
    tokens, masks = [], []
    with own_precision(weight):
        for batch, length in zip(flat.split(chunk), parts, strict=True):
            encoded, mask = encoder.encode(batch, length)
            tokens.append(_normalised(norm, encoded))
            masks.append(mask)
    return torch.cat(tokens), torch.cat(masks)


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
    """Positions of each medium's frames or clips.

    Args:
        table: ``[1, n, 1, D]`` learnt positions. Up to ``n`` frames take its first entries; more take positions
            interpolated between its first and last entry.
        counts: Each medium's ``T``.

    Returns:
        ``[B, T, 1, D]``, or ``[1, T, 1, D]`` where all counts are equal; zeros behind a medium's end.
    """

    def of(count: int) -> Tensor:
        if count <= table.shape[1]:
            return table[:, :count]
        line = table[:, :, 0].transpose(1, 2)
        line = functional.interpolate(line, size=count, mode="linear", align_corners=table.shape[1] > 1)
        return line.transpose(1, 2).unsqueeze(2)

    if len(set(counts)) == 1:
        return of(counts[0])
    longest = max(counts)
    return torch.cat([functional.pad(of(count), (0, 0, 0, 0, 0, longest - count)) for count in counts])


def _normalised(norm: nn.Module, tokens: Tensor) -> Tensor:
    with torch.autocast(tokens.device.type, enabled=False):
        return norm(tokens.float())
