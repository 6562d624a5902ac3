"""Whether a language model's folder holds a delta: the difference to a LLaMA, as Vicuna v0 and v1.1 were published.

A delta has the names and shapes of a whole model and loads without a fault; its answers are noise. It is told by the
last norm's weights, a small tensor: near 1 or above in every LLaMA, near 0 in the difference of two.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import checkpoint

LEAST = 0.1
"""Mean size of the last norm's weights below which they are a difference; training moves them by hundredths."""

_LAST_NORM = ("model.norm.weight", "norm.weight")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def fault(folder: Path) -> str:
    """That a folder holds a delta and how to mend it; nothing if it is whole, or no LLaMA, or cannot be read."""
    if _config(folder).get("model_type") != "llama" or (norm := _last_norm(folder)) is None:
        return ""
    size = norm.float().abs().mean().item()
    if not size < LEAST:
        return ""
    return (
        f"{folder} holds delta weights, the difference to a LLaMA (the last norm's weights are {size:.2g} on average, "
        "a whole model's near 1 or above): add them to the LLaMA that they belong to, as docs/weights.md says "
        "(python3 -m fastchat.model.apply_delta), and name the result"
    )


def named(folder: Path) -> str:
    """The name by which a folder calls its weights a delta, its own or that in its configuration; nothing if none."""
    names = (folder.resolve().name, str(_config(folder).get("_name_or_path", "")))
    return next((name for name in names if "delta" in name.lower()), "")


def _config(folder: Path) -> dict:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _last_norm(folder: Path) -> Tensor | None:
    """The last norm's weights; none where they are not found, which loading will say in its own words."""
    from safetensors import SafetensorError, safe_open

    for file in _holding(folder):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    name = next((name for name in _LAST_NORM if name in opened.keys()), None)  # noqa: SIM118 (no mapping)
                    found = None if name is None else opened.get_tensor(name)
            else:
                content = checkpoint.load_torch(file)
                found = next((content[name] for name in _LAST_NORM if name in content), None)
        except (SafetensorError, CheckpointError, OSError, ValueError, TypeError):
            return None
        if (
            isinstance(found, Tensor)
            and found.is_floating_point()
            and not found.is_meta
            and found.layout is torch.strided
        ):
            return found
    return None


def _holding(folder: Path) -> list[Path]:
    """The files in which the last norm may lie, safetensors before copies in torch's format."""
    for index, whole in zip(_INDEXES, ("model.safetensors", "pytorch_model.bin"), strict=True):
        if (folder / whole).is_file():
            return [folder / whole]
        try:
            places = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
            return [folder / places[name] for name in _LAST_NORM if name in places]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return []
