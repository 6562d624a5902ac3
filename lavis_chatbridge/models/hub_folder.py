"""A language model's folder of Hugging Face's form: the weight files that loading takes, and whether they are whole.

It builds no model: a LLaMA's names and shapes follow from its configuration; of other families the files alone are
judged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import checkpoint, delta, shapes

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_TOKENIZERS = ("tokenizer.model", "tokenizer.json", "vocab.*", "*.model", "*.tiktoken")
"""The first are LLaMA's and most others', the rest those of older families."""


class Content(NamedTuple):
    """What a folder holds.

    Attributes:
        tensors: Its tensors by name, on the meta device: shapes and types without numbers.
        unused: Names of tensors that the model has no place for.
    """

    tensors: dict[str, Tensor]
    unused: list[str]


def is_one(place: Path) -> bool:
    """Whether a place is meant as such a folder: it has a configuration."""
    try:
        return place.is_dir() and (place / "config.json").is_file()
    except OSError:
        return False


def config_of(folder: Path) -> dict[str, Any]:
    """Its configuration; of a model of several parts, that of the text.

    Raises:
        CheckpointError: If it cannot be read, or is no object.
    """
    config = _json(folder / "config.json")
    own = config.get("text_config", config) if isinstance(config, dict) else config
    if not isinstance(own, dict):
        raise CheckpointError(f"{folder / 'config.json'} holds no object")
    return own


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: safetensors before torch's format, one file before parts.

    Raises:
        CheckpointError: If there are none, or one that an index names is missing.
    """
    for whole in _WHOLE:
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [folder / whole]
        if index.is_file():
            return [folder / name for name in sorted(set(_places(folder, index).values()))]
    raise CheckpointError(f"{folder} holds no weights ({' or '.join(_WHOLE)}, or parts of them with an index)")


def tokenizer_file(folder: Path) -> Path:
    """The file that holds the tokenizer's pieces.

    Raises:
        CheckpointError: If there is none.
    """
    found = (file for name in _TOKENIZERS for file in sorted(folder.glob(name)) if file.is_file())
    if (first := next(found, None)) is None:
        raise CheckpointError(f"{folder} holds no tokenizer (tokenizer.model or tokenizer.json)")
    return first


def fault(folder: Path) -> str:
    """Why a folder is no whole language model (a delta, say), by names and first bytes; nothing if it is one."""
    try:
        config_of(folder)
        for file in weight_files(folder):
            checkpoint.check_no_stand_in(file)
        checkpoint.check_no_stand_in(tokenizer_file(folder))
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{folder} cannot be read: {checkpoint.one_line(error)}"
    return delta.fault(folder)


def check(folder: Path) -> Content:
    """Read every file of a folder and hold the tensors against its configuration.

    Raises:
        CheckpointError: If the folder is not whole, a file is damaged, or tensors are missing or misfit.
    """
    if told := fault(folder):
        raise CheckpointError(told)
    config = config_of(folder)
    quantised = "quantization_config" in config  # then numbers of any type, whose scales are tensors of their own
    _check_family(folder)
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors = checkpoint.tensors_of(file)
        if not quantised:
            checkpoint.check_plain(tensors, file)
            checkpoint.check_finite(tensors, file)
        checkpoint.check_sums(file)
        found |= {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    _check_promised(folder, found)
    if quantised or config.get("model_type") != "llama":
        return Content(found, [])
    expected = shapes.llama_shapes(config)
    named = {name if name in expected else f"model.{name}": tensor for name, tensor in found.items()}
    used = {name: tensor for name, tensor in named.items() if name in expected}
    checkpoint.check_fit(expected, used, expected, folder, "its config.json")
    unused = [name for name in found if name not in expected and f"model.{name}" not in expected]
    return Content(found, [name for name in unused if not name.endswith("rotary_emb.inv_freq")])


def _check_family(folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    config = _json(folder / "config.json")
    if "text_config" not in config and config.get("model_type") not in KNOWN:
        raise CheckpointError(
            f"{folder / 'config.json'} names the model_type {config.get('model_type')!r}, which is no causal language "
            "model that the installed transformers knows"
        )


def _check_promised(folder: Path, found: dict[str, Tensor]) -> None:
    for whole in _WHOLE:
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return
        if index.is_file():
            missing = [name for name in _places(folder, index) if name not in found]
            if missing:
                raise CheckpointError(f"the parts in {folder} lack tensors of {index.name}: {checkpoint.some(missing)}")
            return


def _places(folder: Path, index: Path) -> dict[str, str]:
    """Tensor -> the file that holds it, as an index says; all the files are there."""
    content = _json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} names no files by tensor (weight_map)")
    if missing := [name for name in sorted(set(places.values())) if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {checkpoint.some(missing)}, which {index.name} names: fetch the folder again"
        )
    return places


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {checkpoint.one_line(error)}") from error
