"""How much one medium may cost: the bounds that keep a hostile or broken file from eating memory or time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on opening one medium. What exceeds one of them raises ``MediaError``.

    Attributes:
        max_pixels: Width times height of a picture or a video frame. The default is the one at which Pillow starts to
            warn.
        max_seconds: Length of a sound.
        max_frames: Frames in a video or an animated picture.
        max_bytes: Size of the decoded result; of a sound, as mono and before it is resampled.
        timeout: Seconds of decoding of one video or sound, checked between packets.
    """

    max_pixels: int = 89_478_485
    max_seconds: float = 3600.0
    max_frames: int = 500_000
    max_bytes: int = 1 << 31
    timeout: float = 60.0


DEFAULT_LIMITS = Limits()
