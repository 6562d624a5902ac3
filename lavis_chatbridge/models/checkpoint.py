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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.files import atomic_file
from lavis_chatbridge.models.vision import fit_positions

PACKAGE = "package:"
NAMED = 4
"""So many names are listed of each sort of mismatch; the rest is counted."""

_LONGEST_NAME = 200
_REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Smaller floats come with scales beside them, and are no weights without."""

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
    get = f" ({hint})" if hint else ""
    if not path.strip():
        raise CheckpointError(f"{what} is empty: name a file, or set it to null{get}")
    try:
        if path.startswith(PACKAGE):
            place = Path(__file__).resolve().parent.parent / path[len(PACKAGE) :]
        else:
            place = Path(os.path.expandvars(path)).expanduser()
        if place.exists():
            return place
    except (OSError, RuntimeError) as error:  # a folder that may not be looked into, a home that nobody has
        raise CheckpointError(f"{what}: {shown(path)} cannot be looked for: {one_line(error)}") from error
    unset = [name for name in re.findall(r"\$\{?(\w+)", path) if name not in os.environ]
    because = "".join(f"; the environment variable {name} is not set" for name in unset)
    raise CheckpointError(f"{what}: {place} does not exist{because}{get}")


def read(path: Path) -> WeightFile:
    """Read a weight file into main memory, mapped where the format allows. No code in it is run.

    Args:
        path: The file, or a checkpoint's folder that training wrote. Its content tells its format, not its name.

    Raises:
        CheckpointError: If it is damaged, holds other objects than tensors and plain values, or no tensors.
    """
    path = file_at(path)
    content, cfg = _contents(path)
    if isinstance(content.get("cfg"), Mapping):
        cfg = dict(content["cfg"])
    if isinstance(content.get("model"), Mapping):
        content = dict(content["model"])
    named = {n: t for n, t in content.items() if isinstance(n, str) and isinstance(t, Tensor)}
    tensors = {name.removeprefix("module."): tensor for name, tensor in named.items()}
    if len(tensors) < len(named):
        twice = [name for name in named if f"module.{name}" in named]
        raise CheckpointError(
            f"{path} holds tensors twice, with 'module.' before their names and without: {some(twice)}"
        )
    if not tensors:
        held = f"it holds {some(content)}" if content else "it holds nothing"
        raise CheckpointError(f"{path} holds no weights by name, neither at its top nor under 'model'; {held}")
    check_plain(tensors, path)
    return WeightFile(path, tensors, cfg)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors at a file's top under the names that they have there. No code in it is run.

    Raises:
        CheckpointError: If it is damaged, or holds other objects than tensors and plain values.
    """
    content, _ = _contents(path)
    return {n: t for n, t in content.items() if isinstance(n, str) and isinstance(t, Tensor)}


def check_sums(path: Path) -> None:
    """Compare the parts of a file of ``torch.save`` with the checksums that it holds; other formats hold none.

    Raises:
        CheckpointError: If one differs.
    """
    with _archive(path) as archive:
        wrong = None if archive is None else archive.testzip()
    if wrong is not None:
        raise CheckpointError(f"{path} is damaged: {shown(wrong)} in it differs from its checksum; get or make it anew")


def save(path: Path, tensors: Mapping[str, Tensor], cfg: Mapping[str, Any] | None = None) -> None:
    """Write tensors as safetensors; a reader sees the old file or the new one, never a part.

    Args:
        path: Where to.
        tensors: The tensors; some may share memory.
        cfg: A configuration to keep beside them, of plain values.
    """
    from safetensors.torch import save_file

    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
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
        raise CheckpointError(f"{source} holds other than plain tensors of whole or real numbers: {some(odd)}")


def check_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Refuse NaN and infinity, and numbers that fp32 cannot hold.

    Raises:
        CheckpointError: With the tensors that hold one.
    """
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not _is_finite(t)]
    if bad:
        raise CheckpointError(f"{source} holds NaN or infinity in {some(bad)}; get or make the file anew")


def check_range(dtypes: Mapping[str, torch.dtype], tensors: Mapping[str, Tensor], source: object) -> None:
    """Refuse numbers that float16 would turn into infinity.

    Args:
        dtypes: The precision that each tensor will have, by name.
        tensors: Finite tensors.
        source: Where they come from, for the message.

    Raises:
        CheckpointError: With the names of their tensors.
    """
    narrowed = [name for name, tensor in tensors.items() if dtypes[name] == torch.float16 != tensor.dtype]
    lost = [name for name in narrowed if not _is_finite(tensors[name].half())]
    if lost:
        raise CheckpointError(
            f"{source} holds numbers too large for float16 in {some(lost)}: choose bfloat16 or float32"
        )


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
        CheckpointError: If one is missing, too many, of another shape, not finite, or too large for the precision; the
            module is then as before.
    """
    expected = module.state_dict()
    check_fit(expected, tensors, expected, source, what)
    check_finite(tensors, source)
    module.load_state_dict(_converted(tensors, dtype, source), strict=True, assign=True)


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
    words = [label + some(names) for label, names in faults if names]
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
    table = kept.get("pos_embed")
    if table is not None and table.dim() == 3 and table.shape[1] > 1 and table.numel():
        kept["pos_embed"] = fit_positions(table, tokens)
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
    if "query_tokens" in kept and "image_query_tokens" not in kept:
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


def file_at(path: Path) -> Path:
    """The file itself, or the one that training wrote into a checkpoint's folder.

    Raises:
        CheckpointError: If it is not there.
    """
    try:
        if path.is_file():
            return path
        if (path / "config.json").is_file():
            raise CheckpointError(f"{path} is a language model's folder, expected a weight file")
        if (path / "model.safetensors").is_file():
            return path / "model.safetensors"
        fault = "is no file that can be read" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {'is a folder without model.safetensors' if path.is_dir() else fault}")
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {one_line(error)}") from error


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    return _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)


def _is_safetensors(path: Path) -> bool:
    """By its content: a length in eight bytes, then JSON. A file of neither format is judged by its name."""
    head = check_no_stand_in(path)
    named = path.suffix == ".safetensors"
    if head[8:9] == b"{":
        return True
    if named and head.startswith((b"PK\x03\x04", b"\x80")):  # torch goes by the name, and fails
        raise CheckpointError(f"{path} is a file of torch.save, despite its name: rename it to end in .pth")
    return named


def check_no_stand_in(path: Path) -> bytes:
    """The first bytes of a file that is neither empty nor what a failed download leaves in a file's place.

    Raises:
        CheckpointError: If it is, or may not be read.
    """
    try:
        with open(path, "rb") as opened:
            head = opened.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if not head:
        raise CheckpointError(f"{path} is empty: get it anew")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file that it stands for: git lfs pull fetches that"
        )
    if head.lstrip().startswith((b"<!", b"<html", b"<HTML", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights: get the file itself")
    return head


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        cfg = json.loads(metadata["cfg"]) if "cfg" in metadata else None
    except (SafetensorError, OSError, ValueError, RecursionError, TypeError) as error:
        raise CheckpointError(_damaged(path, error)) from error
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
    check_no_stand_in(path)
    _check_archive(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files written before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"the object {shown(named.group(1))}"
            if named
            else "other objects than tensors and plain values, or is damaged"
        )
        raise CheckpointError(f"{path} is refused: it holds {what}; only tensors are loaded, never code") from error
    except Exception as error:  # at damaged files torch lets through whatever its parts raise
        raise CheckpointError(_damaged(path, error)) from error


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile | None]:
    """A file of ``torch.save`` as the zip archive that it is; none for files of another form.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield archive
        else:
            yield None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:  # the last: an unknown compression
        raise CheckpointError(_damaged(path, error)) from error


def _check_archive(path: Path) -> None:
    """Refuse compressed members: ``torch.save`` stores its own as they are, and a megabyte may stand for gigabytes."""
    with _archive(path) as archive:
        members = [] if archive is None else archive.infolist()
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(f"{path} is refused: its parts are compressed ({some(packed)}), as torch writes none")


def _converted(tensors: Mapping[str, Tensor], dtype: torch.dtype, source: object) -> dict[str, Tensor]:
    """The tensors in another precision, each on its own; one that has it already is not copied.

    Raises:
        CheckpointError: If a number is too large for the precision.
    """
    check_range(dict.fromkeys(tensors, dtype), tensors, source)
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        return False
    if tensor.is_floating_point() and tensor.dtype not in _REAL:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.float() if tensor.dtype == torch.float64 else tensor).all())


def some(names: Iterable[object]) -> str:
    """The first few of some names, and how many more there are."""
    listed = [shown(name) for name in names]
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


def shown(name: object) -> str:
    """A name from a file on one line; what would steer a terminal is spelt out."""
    line = " ".join(str(name)[:_LONGEST_NAME].split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def one_line(error: BaseException) -> str:
    """What an exception of a library says, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _damaged(path: Path, error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"{path} cannot be read: there is not enough memory"
    return f"{path} cannot be read ({one_line(error)}): it is damaged or cut off, get or make it anew"
