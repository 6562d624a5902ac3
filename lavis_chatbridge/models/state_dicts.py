"""Weight files: reads them without running code from them, checks them, and loads them completely or not at all.

Known layouts: plain tensors; tensors under ``model`` (LAVIS, the original ChatBridge); ``cfg`` and ``model`` (BEATs);
safetensors, one file or shards in a folder; BLIP-2 of LAVIS and of Hugging Face. This module builds no model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lavis_chatbridge import hub
from lavis_chatbridge.errors import CheckpointError, one_line
from lavis_chatbridge.files import atomic_file

BLIP2_VISION, BLIP2_BRIDGE = ("vision_model.",), ("query_tokens", "qformer.", "vision_model.post_layernorm.")
"""Prefixes, in Hugging Face's layout, of BLIP-2's tensors for the vision encoder and for the bridge."""

_DROPPED = re.compile(
    r"rotary_emb\.inv_freq$|position_ids$|^Qformer\.cls\.|^Qformer\.bert\.embeddings\.(word|position)_embeddings\."
    r"|^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."
)
"""Constants, and the text branch of the Q-Former, which ChatBridge does not have."""

_FROM_HUGGINGFACE = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"visual_encoder.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual_encoder.blocks.\1.attn.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"visual_encoder.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^qformer\.encoder\.layer\.(\d+)\.(\w*attention)\.attention\.", r"Qformer.bert.encoder.layer.\1.\2.self."),
    (r"^qformer\.", "Qformer.bert."),
)


class WeightFile(NamedTuple):
    """The tensors of a file or folder by name, and the configuration in the file (BEATs, LoRA), if any."""

    path: Path
    tensors: dict[str, Tensor]
    cfg: dict[str, Any] | None


def read(path: Path, prefixes: Sequence[str] = ()) -> WeightFile:
    """Read weights on the CPU, memory-mapped if the format allows. No code in the file is run.

    Args:
        path: A file, or a folder with ``model.safetensors`` or shards (a training checkpoint, a hub's repository).
        prefixes: Read only the shards of a folder that have tensors with these prefixes.

    Raises:
        CheckpointError: If it cannot be read, contains objects other than tensors and plain values, or has no tensors.
    """
    files = [path] if path.is_file() else hub.require_files(path, "weights", prefixes)
    content: dict[str, Any] = {}
    for file in (file for file in files if file.suffix != ".json"):
        content |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    cfg = dict(content["cfg"]) if isinstance(content.get("cfg"), Mapping) else None
    if isinstance(content.get("model"), Mapping):
        content = dict(content["model"])
    tensors = {str(n).removeprefix("module."): t for n, t in content.items() if isinstance(t, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} contains {shortened(content) or 'nothing'}, expected tensors by name")
    return WeightFile(path, tensors, cfg)


def save(path: Path, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any] | None = None) -> None:
    """Write tensors (which may share memory) and a configuration of plain values as safetensors, atomically."""
    from safetensors.torch import save_file

    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(apart, temporary, metadata=None if cfg is None else {"cfg": json.dumps(dict(cfg))})


def load_exactly(
    module: nn.Module, tensors: Mapping[str, Tensor], source: object, what: str, dtype: torch.dtype = torch.float32
) -> None:
    """Replace all parameters and buffers of a module, which may be on the meta device.

    Floating-point tensors are converted to ``dtype``; those that have it already stay memory-mapped. Error messages
    name the file (``source``) and the module (``what``).

    Raises:
        CheckpointError: If a tensor is missing, unexpected, of another shape, or not finite in ``dtype``; the module is
            then unchanged.
    """
    converted = {n: (t.to(dtype) if t.is_floating_point() else t).contiguous() for n, t in tensors.items()}
    expected = module.state_dict()
    check_fit(expected, converted, expected, source, what if dtype == torch.float32 else f"{what} in {dtype}")
    module.load_state_dict(converted, strict=True, assign=True)


def check_fit(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], required: Iterable[str], source: object, what: str
) -> None:
    """Raise a `CheckpointError` if tensors of ``source`` do not fit ``what``, or a required one is missing."""
    both = {name: (tensor, expected[name]) for name, tensor in found.items() if name in expected}
    shapes = [
        f"{name} is {list(tensor.shape)}, expected {list(own.shape)}"
        for name, (tensor, own) in both.items()
        if tensor.shape != own.shape
    ]
    missing = [name for name in required if name not in found]
    unexpected = [name for name in found if name not in expected]
    infinite = [name for name, (tensor, own) in both.items() if not tensor.to(own.dtype).isfinite().all()]
    faults = [("missing: ", missing), ("unexpected: ", unexpected), ("", shapes), ("NaN or infinity in ", infinite)]
    if words := [label + shortened(names) for label, names in faults if names]:
        raise CheckpointError(f"{source} does not fit {what}: {'; '.join(words)}")


def from_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BLIP-2's tensors under LAVIS's names; tensors of another layout are returned as they are.

    Hugging Face has one bias vector for queries, keys and values; LAVIS has two. A bias of keys adds the same number to
    all scores of a query, so it has no effect.
    """
    if not any(name.startswith(("vision_model.", "qformer.")) for name in tensors):
        return dict(tensors)
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _FROM_HUGGINGFACE:
            name = re.sub(pattern, replacement, name)
        if name.startswith("visual_encoder.") and name.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            stem = name.removesuffix("qkv.bias")
            named |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
        else:
            named[name] = tensor
    return named


def bridge_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ChatBridge's or BLIP-2's tensors under ChatBridge's names, without constants and the Q-Former's text branch."""
    kept = {name: tensor for name, tensor in from_huggingface(tensors).items() if not _DROPPED.search(name)}
    if "query_tokens" in kept and "image_query_tokens" not in kept:
        kept["image_query_tokens"] = kept.pop("query_tokens")
    return kept


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, which is removed."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def hash_of(tensors: Mapping[str, Tensor], *more: object) -> str:
    """A hash (16 hex digits) of tensors, their names, and the ``repr`` of more values."""
    found = hashlib.sha256(repr(more).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules on the meta device, without memory for parameters; constants (positions, schedules) are real."""
    with torch.device("meta"), _RealConstants():
        yield


class _RealConstants(TorchFunctionMode):
    """Keeps constants off the meta device: building EVA-ViT reads a schedule, and weight files have no position ids."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if function in (torch.arange, torch.linspace):
            named.setdefault("device", "cpu")
        return function(*args, **named)


def shortened(names: Iterable[object]) -> str:
    """The first four names, and the number of the rest."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            content: dict[str, Any] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if (cfg := (opened.metadata() or {}).get("cfg")) is not None:
                content["cfg"] = json.loads(cfg)
        return content
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(_damaged(path, error)) from error


def _read_torch(path: Path) -> dict[str, Any]:
    """The mapping in a ``torch.save`` file, memory-mapped if the format allows; no code in it is run."""
    try:
        with open(path, "rb") as file:
            head = file.read(2)
        zipped = head == b"PK"  # files of torch before 1.6 are not, and cannot be mapped
        if not zipped and head[:1] != b"\x80":
            raise ValueError("neither a zip nor a pickle")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: only tensors are loaded, never code, but it contains other objects or is damaged"
        ) from error
    except Exception as error:  # torch raises any error of its zip and pickle readers
        raise CheckpointError(_damaged(path, error)) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} contains a {type(content).__name__}, expected tensors by name")
    return dict(content)


def _damaged(path: Path, error: BaseException) -> str:
    return f"{path} cannot be read ({one_line(error, 200)}): it is damaged or not a weight file, download it again"
