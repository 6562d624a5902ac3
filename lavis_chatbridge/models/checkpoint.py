"""Weight files: found, read without running code from them, checked against a module, loaded whole or not at all.

The layouts known here: plain tensors, tensors under ``model`` (LAVIS and the original ChatBridge, beside optimizer and
config), ``cfg`` and ``model`` (BEATs), safetensors with a ``cfg`` in the metadata, BLIP-2. This module builds no model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models.vision import fit_positions
from lavis_chatbridge.writing import whole_file

PACKAGE = "package:"
NAMED = 4
"""So many names are listed of each sort of mismatch; the rest is counted."""

_LONGEST_NAME = 200
_DROPPED = re.compile(
    r"rotary_emb\.inv_freq$|position_ids$|^Qformer\.cls\.|^Qformer\.bert\.embeddings\.(word|position)_embeddings\."
    r"|^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\."
)
"""Constants, and the text branch of the Q-Former, which ChatBridge does not have."""


class WeightFile(NamedTuple):
    """What a weight file holds.

    Attributes:
        path: Where it was found.
        tensors: The tensors by name.
        cfg: The configuration beside them, or none.
    """

    path: Path
    tensors: dict[str, Tensor]
    cfg: dict[str, Any] | None


def find(path: str, what: str, hint: str = "") -> Path:
    """The file or folder that a setting names.

    Args:
        path: A path; ``package:a/b`` lies inside the installed package, ``~`` and ``$NAME`` are expanded.
        what: What is looked for, for the message.
        hint: Where it can be had, for the message.

    Raises:
        CheckpointError: If it is not there.
    """
    if path.startswith(PACKAGE):
        place = Path(__file__).resolve().parent.parent / path[len(PACKAGE) :]
    else:
        place = Path(os.path.expandvars(path)).expanduser()
    if place.exists():
        return place
    unset = [name for name in re.findall(r"\$\{?(\w+)", path) if name not in os.environ]
    because = "".join(f"; the environment variable {name} is not set" for name in unset)
    get = f" ({hint})" if hint else ""
    raise CheckpointError(f"{what}: {place} does not exist{because}{get}")


def read(path: Path) -> WeightFile:
    """Read a weight file into main memory, mapped where the format allows. No code in it is run.

    Raises:
        CheckpointError: If it is damaged, holds other objects than tensors and plain values, or no tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    content, cfg = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(content.get("cfg"), Mapping):
        cfg = dict(content["cfg"])
    if isinstance(content.get("model"), Mapping):
        content = dict(content["model"])
    tensors = {
        name.removeprefix("module."): value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    check_plain(tensors, path)
    if not tensors:
        raise CheckpointError(f"{path} holds no weights; it holds {_some(content)}")
    return WeightFile(path, tensors, cfg)


def save(path: Path, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any] | None = None) -> None:
    """Write tensors as safetensors; a reader sees the old file or the new one, never a part.

    Args:
        path: Where to.
        tensors: The tensors; some may share memory.
        cfg: A configuration to keep beside them, of plain values.
    """
    from safetensors.torch import save_file

    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        save_file(apart, temporary, metadata=written_with(apart, cfg))


def written_with(tensors: Mapping[str, Tensor], cfg: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The metadata of a safetensors file: a configuration, and what `read` compares the tensors with."""
    fixed = {"fingerprint": fingerprint(tensors)}
    return fixed if cfg is None else {"cfg": json.dumps(dict(cfg)), **fixed}


def check_plain(tensors: Mapping[str, Tensor], source: object) -> None:
    """Refuse tensors that are no plain arrays of numbers, each with a place in the file.

    Raises:
        CheckpointError: With the names of those that are not. Nothing is computed with them before.
    """
    odd = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if odd:
        raise CheckpointError(f"{source} holds other than plain tensors of whole or real numbers: {_some(odd)}")


def check_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Refuse NaN and infinity, and numbers that fp32 cannot hold.

    Raises:
        CheckpointError: With the tensors that hold one.
    """
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not _is_finite(t)]
    if bad:
        raise CheckpointError(f"{source} holds NaN or infinity in {_some(bad)}; get or make the file anew")


def load_exactly(
    module: nn.Module, tensors: Mapping[str, Tensor], source: object, what: str, dtype: torch.dtype = torch.float32
) -> None:
    """Give a module exactly these tensors in place of its own, which may be on the meta device.

    They are taken over: one that has the precision already is not copied, and stays mapped where its file is.

    Args:
        module: The module.
        tensors: All its tensors by name.
        source: Where they come from, for the message.
        what: What they are for, for the message.
        dtype: The precision that the module has afterwards.

    Raises:
        CheckpointError: If one is missing, too many, of another shape, or not finite; the module is then as before.
    """
    expected = module.state_dict()
    check_fit(expected, tensors, expected, source, what)
    check_finite(tensors, source)
    module.load_state_dict({name: t.to(dtype).contiguous() for name, t in tensors.items()}, strict=True, assign=True)


def check_fit(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], required: Iterable[str], source: object, what: str
) -> None:
    """Refuse tensors that do not fit, with all that is wrong in one line.

    Args:
        expected: The tensors that there is a place for.
        found: The tensors to load.
        required: The names that must be among them.
        source: Where they come from, for the message.
        what: What they are for, for the message.

    Raises:
        CheckpointError: With names, and shapes found and expected.
    """
    missing = [name for name in required if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} is {list(found[name].shape)}, expected {list(expected[name].shape)}"
        for name in found
        if name in expected and found[name].shape != expected[name].shape
    ]
    shapes += [
        f"{name} is {str(found[name].dtype).removeprefix('torch.')}, expected real numbers"
        for name in found
        if name in expected and expected[name].is_floating_point() and not found[name].is_floating_point()
    ]
    faults = [("missing: ", missing), ("unexpected: ", unexpected), ("", shapes)]
    words = [label + _some(names) for label, names in faults if names]
    if words:
        raise CheckpointError(f"{source} does not fit {what}: {'; '.join(words)}")


def vision_tensors(tensors: Mapping[str, Tensor], depth: int, tokens: int) -> dict[str, Tensor]:
    """An EVA-ViT's tensors, from its own file or from a model that holds it.

    Args:
        tensors: As read. The block after the last one used, and heads and final norms, which BLIP-2 leaves out, are
            dropped.
        depth: Blocks of the model to load.
        tokens: Tokens of an image, to which the positions are fitted.
    """
    own = part(tensors, "visual_encoder.") or dict(tensors)
    unused = (f"blocks.{depth}.", "norm.", "fc_norm.", "head.")
    kept = {name: tensor for name, tensor in own.items() if not name.startswith(unused)}
    if "pos_embed" in kept and kept["pos_embed"].dim() == 3 and kept["pos_embed"].shape[1] > 1:
        kept["pos_embed"] = fit_positions(kept["pos_embed"], tokens)
    return kept


def beats_tensors(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A BEATs' tensors, from its own file or from a model that holds it, without a classification head.

    The relative-position table is one for all layers; where a file holds it once, it is put under every layer's name.
    """
    own = part(tensors, "audio_encoder.") or dict(tensors)
    kept = {name: tensor for name, tensor in own.items() if not name.startswith("predictor.")}
    table = kept.get("encoder.layers.0.self_attn.relative_attention_bias.weight")
    if table is not None:
        for i in range(1, layers):
            kept.setdefault(f"encoder.layers.{i}.self_attn.relative_attention_bias.weight", table)
    return kept


def bridge_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ChatBridge's or BLIP-2's tensors under ChatBridge's names, without constants and the Q-Former's text branch."""
    kept = {name: tensor for name, tensor in tensors.items() if not _DROPPED.search(name)}
    if "query_tokens" in kept:
        kept["image_query_tokens"] = kept.pop("query_tokens")
    return kept


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fingerprint(tensors: Mapping[str, Tensor], *more: object) -> str:
    """A short string that changes when a tensor, a name or one of ``more`` does."""
    digest = hashlib.sha256(repr(more).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        cfg = json.loads(metadata["cfg"]) if "cfg" in metadata else None
    except (SafetensorError, OSError, ValueError, RecursionError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {_one_line(error)}") from error
    if not isinstance(cfg, (dict, type(None))):
        raise CheckpointError(f"{path} cannot be read: the cfg in its metadata is no object")
    if metadata.get("fingerprint") not in (None, fingerprint(tensors)):
        raise CheckpointError(f"{path} holds other tensors than were written: get or make the file anew")
    return tensors, cfg


def _read_torch(path: Path) -> tuple[dict[str, Any], None]:
    content = load_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no weights by name, but a {type(content).__name__}")
    return dict(content), None


def load_torch(path: Path) -> Any:
    """What a file of ``torch.save`` holds, mapped where the format allows. No code in it is run.

    Raises:
        CheckpointError: If it is damaged, or holds other objects than tensors and plain values.
    """
    _check_archive(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files written before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the object {named.group(1)}" if named else "other objects than tensors and plain values, or is damaged"
        raise CheckpointError(f"{path} is refused: it holds {what}; only tensors are loaded, never code") from error
    except Exception as error:  # at damaged files torch lets through whatever its parts raise
        raise CheckpointError(f"{path} cannot be read: {_one_line(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse compressed members: ``torch.save`` stores its own as they are, and a megabyte may stand for gigabytes."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} cannot be read: {_one_line(error)}") from error
    if packed:
        raise CheckpointError(f"{path} is refused: its parts are compressed ({_some(packed)}), as torch writes none")


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.float() if tensor.dtype == torch.float64 else tensor).all())


def _some(names: Iterable[object]) -> str:
    listed = [" ".join(str(name)[:_LONGEST_NAME].split()) for name in names]
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
