"""Samples per second and core of the processors, against a plain one-by-one pipeline that gives the same pixels.

Run from the repository's root, on a quiet machine::

    OMP_NUM_THREADS=1 python benchmarks/data_speed.py [--seconds 2] [--write benchmarks/data_speed.md]

The plain pipeline is the obvious one: Pillow and torchvision on the whole picture, every frame of a video
decoded and then picked, every channel resampled and a filterbank for each clip. Both read the same files, made here:
photo-like noise as JPEG and PNG, H.264 with long and short groups of pictures, stereo sound at 44.1 kHz. The
difference of the results is on the scale from black 0 to white 1, for filterbanks in normalised units. Goals: 1.7
times as fast for pictures, 2.0 for videos, 1.4 for sounds.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import decord
import numpy as np
import PIL
import soundfile
import torch
import torchaudio
import torchvision
from common import circumstances, command_line, write_table
from PIL import Image
from torchaudio.compliance.kaldi import fbank
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

from lavis_chatbridge.media import open_image
from lavis_chatbridge.processors import AudioEvalProcessor, ImageEvalProcessor, VideoEvalProcessor
from lavis_chatbridge.processors.audio import MEAN, STD
from lavis_chatbridge.processors.pictures import CLIP_MEAN, CLIP_STD, frame_indices

SIZE, FRAMES, MEL_BINS, CLIP = 224, 4, 128, 1024

PLAIN_TRANSFORM = Compose([Resize((SIZE, SIZE), InterpolationMode.BICUBIC), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)])


def plain_image(path: Path) -> torch.Tensor:
    """Pillow, then torchvision, at full size."""
    return PLAIN_TRANSFORM(Image.open(path).convert("RGB"))


def plain_video(path: Path) -> torch.Tensor:
    """Every frame decoded, four picked, each transformed separately."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return _transformed([frames[index] for index in frame_indices(len(frames), FRAMES)])


def decord_video(path: Path) -> torch.Tensor:
    """Frames picked by decord, one thread; each frame transformed separately."""
    reader = decord.VideoReader(str(path), num_threads=1)
    return _transformed(np.asarray(reader.get_batch(frame_indices(len(reader), FRAMES))))


def _transformed(frames: Iterable[np.ndarray]) -> torch.Tensor:
    return torch.stack([PLAIN_TRANSFORM(Image.fromarray(frame)) for frame in frames])


def plain_audio(path: Path) -> torch.Tensor:
    """Every channel resampled, mixed down, and one filterbank computed for each clip."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    sound = torchaudio.transforms.Resample(rate, 16_000)(torch.from_numpy(samples.T.copy())).mean(0, keepdim=True)
    total = 1 + (sound.shape[1] - 400) // 160
    clips = []
    for start in range(0, total, CLIP):
        part = sound[:, start * 160 : (start + CLIP - 1) * 160 + 400] * 32768
        frames = (fbank(part, num_mel_bins=MEL_BINS, sample_frequency=16_000) - MEAN) / (2 * STD)
        clips.append(torch.nn.functional.pad(frames, (0, 0, 0, CLIP - len(frames))))
    return torch.stack(clips[:3])


def scenery(width: int, height: int, seed: int) -> np.ndarray:
    """Photo-like noise, weaker at high frequencies: uint8 ``[H,W,3]``."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for cells in (3, 8, 24, 70, 200, 600):
        if cells > min(width, height):
            break
        coarse = rng.normal(0, 90 / cells**0.5, (cells, cells * width // height + 1, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(np.ascontiguousarray(coarse[..., channel]))
            picture[..., channel] += np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
    return (picture + 128).clip(0, 255).astype(np.uint8)


def make_video(path: Path, width: int, height: int, group: int, frames: int = 250) -> Path:
    """10 s of H.264 at 25 frames a second, panning over scenery; a key frame every ``group`` frames."""
    wide = scenery(width + 2 * frames, height, 2)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "bf": "3"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = group
        options = {"x264-params": f"keyint={group}:min-keyint={group}:scenecut=0"}
        stream.codec_context.options = {**stream.codec_context.options, **options}
        for index in range(frames):
            picture = np.ascontiguousarray(wide[:, 2 * index : 2 * index + width])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_sound(path: Path, seconds: float) -> Path:
    """Two channels of noise and tones at 44.1 kHz, 16 bits."""
    rng = np.random.default_rng(3)
    times = np.arange(round(seconds * 44_100)) / 44_100
    left = 0.2 * np.sin(2 * np.pi * 440 * times) + rng.normal(0, 0.05, times.shape)
    soundfile.write(path, np.stack([left, 0.5 * left + rng.normal(0, 0.02, times.shape)], 1), 44_100)
    return path


def rates(functions: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Calls per second of processor time of each function, taken in turns; the best of three rounds each.

    Processor time depends less on other processes.
    """
    best = [0.0] * len(functions)
    for _ in range(3):
        for index, function in enumerate(functions):
            calls, begin = 0, time.process_time()
            while calls == 0 or time.process_time() - begin < seconds / 3:
                function()
                calls += 1
            best[index] = max(best[index], calls / (time.process_time() - begin))
    return best


def compare(
    modality: str,
    what: str,
    ours: Callable[[], torch.Tensor],
    plain: Mapping[str, Callable[[], torch.Tensor]],
    goal: float,
    seconds: float,
) -> list[str]:
    """Rows of the table: ours against each plain pipeline, in samples per second. The goal is for the first."""
    unit = 1.0 if modality == "audio" else sum(CLIP_STD) / 3
    got = ours()
    differences = [(function() - got).abs() * unit for function in plain.values()]
    fast, *slow = rates([ours, *plain.values()], seconds)
    rows = []
    for number, (name, rate, difference) in enumerate(zip(plain, slow, differences, strict=True)):
        rows.append(
            f"| {modality} | {what} | {name} | {rate:.1f} | {fast:.1f} | {fast / rate:.2f} | "
            f"{'' if number else goal} | {difference.mean().item():.4f} | {difference.max().item():.4f} |"
        )
        print(rows[-1], file=sys.stderr)
    return rows


def measure(folder: Path, seconds: float) -> tuple[list[str], str]:
    """All rows of the table, and an explanation of the lowest ratio."""
    rows = []
    image, video, audio = ImageEvalProcessor(), VideoEvalProcessor(), AudioEvalProcessor()
    for name, width, height in (("a.jpg", 640, 480), ("b.jpg", 1920, 1080), ("c.jpg", 4000, 3000), ("d.png", 640, 480)):
        path = folder / name
        Image.fromarray(scenery(width, height, 1)).save(path, quality=90)
        what = f"{path.suffix[1:]} {width} x {height}"
        plain = {"Pillow, torchvision": partial(plain_image, path)}
        rows += compare("image", what, partial(image, path), plain, 1.7, seconds)
    whole, decoding = rates([partial(image, path), partial(open_image, path)], seconds)
    note = f"A PNG cannot be decoded in part or at a smaller size; its decoding is {whole / decoding:.0%} of our time."
    for width, height, group in ((640, 360, 250), (640, 360, 25), (1280, 720, 250)):
        path = make_video(folder / f"{width}_{group}.mp4", width, height, group)
        what = f"H.264 {width} x {height}, 10 s, group of {group}"
        plain = {"every frame": partial(plain_video, path), "decord": partial(decord_video, path)}
        rows += compare("video", what, partial(video, path), plain, 2.0, seconds)
    for length in (10.0, 30.0):
        path = make_sound(folder / f"{length:g}.wav", length)
        plain = {"clip by clip": partial(plain_audio, path)}
        what = f"wav, stereo 44.1 kHz, {length:g} s"
        rows += compare("audio", what, lambda path=path: audio(path).fbank, plain, 1.4, seconds)  # type: ignore[misc]
    return rows, note


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = command_line(__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring for each pipeline and file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows, note = measure(Path(folder), arguments.seconds)
    modules = (torch, torchvision, torchaudio, PIL, av, decord, np)
    how = circumstances("data_speed.py", f"--seconds {arguments.seconds:g}", modules=modules)
    lines = ["# Speed of the data on one core", "", how, "Samples per second of processor time; see the script.", ""]
    lines += ["| modality | file | against | plain | ours | ratio | goal | mean difference | largest |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|---:|", *rows, "", note, ""]
    write_table("\n".join(lines), arguments.write)


if __name__ == "__main__":
    main()
