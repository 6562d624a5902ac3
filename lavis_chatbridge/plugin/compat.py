"""LAVIS 1.0.2 on today's libraries: adds what LAVIS expects and they no longer have; nothing that exists is replaced.

LAVIS was written for transformers 4.25. ``autoload`` calls :func:`patch_transformers` before any of LAVIS's models is
imported, and :func:`loading_models` around ``lavis.models``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def patch_transformers() -> None:
    """Add what has moved or gone: names that LAVIS imports, and attributes that its models need."""
    from transformers import modeling_utils, pytorch_utils

    _add(pytorch_utils, "find_pruneable_heads_and_indices", _dropped)
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        _add(modeling_utils, name, getattr(pytorch_utils, name))
    gone = "transformers.utils.model_parallel_utils"
    if gone not in sys.modules and importlib.util.find_spec(gone) is None:
        stub = ModuleType(gone, "Naive model parallelism, which transformers 5 has dropped.")
        stub.__dict__.update(assert_device_map=_dropped, get_device_map=_dropped)
        sys.modules[gone] = stub
    _add(modeling_utils.PreTrainedModel, "all_tied_weights_keys", {})  # LAVIS's models do not call `post_init`
    _add(modeling_utils.PreTrainedModel, "invert_attention_mask", _invert_attention_mask)
    _add(modeling_utils.PreTrainedModel, "get_head_mask", _get_head_mask)


@contextmanager
def loading_models(name: str) -> Iterator[None]:
    """Surrounds the execution of ``lavis.models``; afterwards its functions do without a model type.

    ``import spacy`` succeeds meanwhile where spacy is not installed: one model of LAVIS needs it. The functions'
    defaults change in place, so that references imported earlier change too.
    """
    absent = "spacy" not in sys.modules and importlib.util.find_spec("spacy") is None
    if absent:
        sys.modules["spacy"] = stub = ModuleType("spacy")
        stub.__dict__["__getattr__"] = _no_spacy
    try:
        yield
    finally:
        if absent:
            del sys.modules["spacy"]
    models = sys.modules[name]
    for function in (models.load_model, models.load_model_and_preprocess):
        function.__defaults__ = (None, *function.__defaults__)


def _add(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        setattr(owner, name, value)


def _no_spacy(attribute: str) -> Any:
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    raise ImportError("this LAVIS model needs the package 'spacy': pip install spacy")


def _dropped(*arguments: Any, **named: Any) -> Any:
    raise NotImplementedError("transformers 5 has dropped pruning, masks of heads and naive model parallelism")


def _invert_attention_mask(self: Any, encoder_attention_mask: Any) -> Any:
    """A mask of ones and zeros, ``[B,N]`` or ``[B,M,N]``, as an addend to scores, ``[B,1,1,N]`` or ``[B,1,M,N]``."""
    import torch

    mask = encoder_attention_mask
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None, :, :]
    return (1.0 - mask.to(self.dtype)) * torch.finfo(self.dtype).min


def _get_head_mask(self: Any, head_mask: Any, num_hidden_layers: int, is_attention_chunked: bool = False) -> Any:
    """One None per layer: LAVIS never masks heads."""
    return [None] * num_hidden_layers if head_mask is None else _dropped()
