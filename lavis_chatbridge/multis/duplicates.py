"""Near duplicates: MinHash signatures of word shingles (Broder 1997), looked up in bands."""

from __future__ import annotations

import hashlib
import re

import numpy as np

_WORD = re.compile(r"\w+")
_HIGH_HALF = np.uint64(32)


class NearDuplicates:
    """Finds texts that share most of their shingles with an earlier text.

    Args:
        threshold: Estimated Jaccard similarity from which two texts count as duplicates.
        shingle: Words per shingle.
        bands: Bands of the look-up.
        rows: Hashes per band; bands x rows hashes make a signature.
    """

    def __init__(self, threshold: float = 0.8, shingle: int = 3, bands: int = 20, rows: int = 6) -> None:
        self._threshold, self._shingle, self._rows = threshold, shingle, rows
        count = bands * rows
        draw = np.random.default_rng(20230516)
        self._factors = draw.integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = draw.integers(0, 1 << 63, count, dtype=np.uint64)
        self._buckets: dict[int, int] = {}  # the first text of each; later ones like it were duplicates
        self._signatures: list[np.ndarray] = []
        self._keys: list[str] = []

    def find(self, text: str) -> tuple[str, float] | None:
        """The earlier text most like this one, with the estimated similarity; None below the threshold."""
        signature = self._signature(text)
        near = {self._buckets[band] for band in self._bands(signature) if band in self._buckets}
        best = max(((float(np.mean(self._signatures[i] == signature)), -i) for i in near), default=(0.0, 0))
        return (self._keys[-best[1]], best[0]) if near and best[0] >= self._threshold else None

    def add(self, key: str, text: str) -> None:
        """Remember a text under a name."""
        signature = self._signature(text)
        index = len(self._keys)
        self._keys.append(key)
        self._signatures.append(signature)
        for band in self._bands(signature):
            self._buckets.setdefault(band, index)

    def _bands(self, signature: np.ndarray) -> list[int]:
        return [hash((band, part.tobytes())) for band, part in enumerate(signature.reshape(-1, self._rows))]

    def _signature(self, text: str) -> np.ndarray:
        words = _WORD.findall(text.lower())
        width = min(self._shingle, max(1, len(words)))
        shingles = {" ".join(words[i : i + width]) for i in range(len(words) - width + 1)} or {""}
        digests = b"".join(hashlib.blake2b(shingle.encode(), digest_size=8).digest() for shingle in shingles)
        hashes = np.frombuffer(digests, dtype="<u8")
        # Multiply-shift hashing: 64-bit numbers wrap around, and the high half is well mixed.
        mixed = hashes[:, None] * self._factors[None, :] + self._offsets[None, :]
        return (mixed >> _HIGH_HALF).min(axis=0).astype(np.uint32)
