"""The golden numbers of what happens to media before the model: transforms, frames taken, filterbank slices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lavis_chatbridge.media import open_audio, open_image
from lavis_chatbridge.processors.audio import cut_slices_as_original, fbank, frame_count
from lavis_chatbridge.processors.pictures import PictureSettings, frame_indices, prepare, uniform_frame_indices

TOLERANCE = 2e-4
"""Of a filterbank: on some CPUs torchaudio's own is 1.6e-4 away from the stored one."""


@pytest.fixture(scope="module")
def slices(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "audio" / "fbank_info.json").read_text())


@pytest.fixture(scope="module")
def stacks(golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "audio" / "fbank_slices.npz"))


@pytest.mark.parametrize(
    ("rule", "choose"), [("frame_index_eval", frame_indices), ("frame_index_demo_uniform", uniform_frame_indices)]
)
def test_frame_indices(golden_dir: Path, rule: str, choose: Callable[[int, int], list[int]]) -> None:
    for case, expected in json.loads((golden_dir / "data_rules.json").read_text())[rule].items():
        count, frames = map(int, case.split("/"))
        assert choose(count, frames) == expected, case


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("video_mapper.antialias_False", {"interpolation": "bilinear", "antialias": False, "arithmetic": "float"}),
        ("video_mapper.antialias_True", {"interpolation": "bilinear", "arithmetic": "float"}),
        ("pil_bicubic_eval", {"arithmetic": "pillow"}),
        ("pil_bicubic_eval", {}),
    ],
)
def test_transforms(golden_dir: Path, name: str, settings: dict[str, Any]) -> None:
    """The default transform differs from Pillow's by one level of 255 at most."""
    expected = torch.from_numpy(np.load(golden_dir / "image" / "transforms.npz")[name])
    picture = open_image(golden_dir / "image" / "sample.png")
    got = prepare(picture[None], PictureSettings(image_size=expected.shape[-1], **settings))
    atol = 2e-5 if settings else 1.01 / (255 * 0.26)
    torch.testing.assert_close(got, expected.reshape(got.shape), atol=atol, rtol=0)


def _samples(golden_dir: Path, clip: str) -> torch.Tensor:
    return torch.from_numpy(open_audio(golden_dir / "audio" / f"{clip}.wav", channel="first"))


def _stored(stacks: dict[str, np.ndarray], rows_of: str) -> tuple[torch.Tensor, int]:
    """The stored slices and the step at which their frames were kept."""
    key = rows_of.split(" ")[0]
    if key in stacks:
        return torch.from_numpy(stacks[key]), 1
    return torch.from_numpy(stacks[f"{key}.every8th_frame"]), 8


def test_fbank_slices(golden_dir: Path, slices: dict[str, Any], stacks: dict[str, np.ndarray]) -> None:
    cases = [(name, info) for name, info in slices.items() if isinstance(info, dict) and "slice_rows" in info]
    assert cases
    for name, info in cases:
        samples = _samples(golden_dir, name.split(".")[0])
        got = cut_slices_as_original(samples, info["mel"], info["target_length"], info["sample_num"]).fbank
        assert list(got.shape) == info["shape"], name
        assert got.abs().sum(dtype=torch.float64).item() == pytest.approx(info["abs_sum"], rel=1e-5), name
        assert got.sum(dtype=torch.float64).item() == pytest.approx(info["sum"], abs=1e-5 * info["abs_sum"]), name
        stack, step = _stored(stacks, info["slices_are_rows_of"])
        for row, stored in zip(got, info["slice_rows"], strict=True):
            expected = torch.zeros_like(row[::step]) if stored < 0 else stack[stored]
            torch.testing.assert_close(row[::step], expected, atol=TOLERANCE, rtol=0)


def test_a_whole_stored_slice(golden_dir: Path, stacks: dict[str, np.ndarray]) -> None:
    names = [name for name in stacks if name.endswith(".slice0")]
    assert names
    for name in names:
        clip, mel = name.split(".")[:2]
        expected = torch.from_numpy(stacks[name])
        got = fbank(_samples(golden_dir, clip), int(mel.removeprefix("mel")))[: len(expected)]
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_slices_of_sounds_that_fill_them_exactly(golden_dir: Path, slices: dict[str, Any]) -> None:
    cases = [(name, info) for name, info in slices.items() if ".exact_multiple." in name]
    assert cases
    for name, info in cases:
        clip, mel = name.split(".")[:2]
        samples, bins, length = _samples(golden_dir, clip), int(mel.removeprefix("mel")), info["target_length"]
        got = cut_slices_as_original(samples, bins, length, info["sample_num"]).fbank
        assert list(got.shape) == info["shape"], name
        assert got.abs().sum(dtype=torch.float64).item() == pytest.approx(info["abs_sum"], rel=1e-5), name
        whole = torch.nn.functional.pad(fbank(samples, bins), (0, 0, 0, 2 * length))
        for row, start in zip(got, info["slice_start_index"], strict=True):
            torch.testing.assert_close(row, whole[start * length : (start + 1) * length], atol=1e-6, rtol=0)


def test_counts(golden_dir: Path, slices: dict[str, Any]) -> None:
    names = [name.removesuffix(".num_frames") for name in slices if name.endswith(".num_frames")]
    assert names
    for name in names:
        samples = _samples(golden_dir, name)
        assert len(samples) == slices[f"{name}.num_samples_16k"]
        assert frame_count(len(samples)) == slices[f"{name}.num_frames"]
