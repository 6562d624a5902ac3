"""LAVIS 1.0.2 on today's libraries: adds what LAVIS expects and they no longer have; nothing that exists is replaced.

LAVIS was written for transformers 4.25. :func:`patch_transformers` must run before ``lavis.models`` is imported,
:func:`patch_lavis` after it; ``autoload`` calls both.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

OPTIONAL_PACKAGES = ("ftfy", "spacy")
"""Imported at the top of single LAVIS models (CLIP's tokenizer, Img2Prompt), which alone need them."""

BASE_CLASSES = {
    "lavis.models.blip2_models.Qformer": "BertPreTrainedModel",
    "lavis.models.blip2_models.modeling_opt": "OPTPreTrainedModel",
    "lavis.models.blip2_models.modeling_t5": "T5PreTrainedModel",
    "lavis.models.blip_models.nlvr_encoder": "BertPreTrainedModel",
    "lavis.models.med": "BertPreTrainedModel",
}
"""LAVIS's modules with a base class that lacks what transformers 5 expects of a model."""


def apply() -> None:
    """Patch everything that is imported already; safe to call at any time and any number of times."""
    patch_transformers()
    for name in BASE_CLASSES:
        if name in sys.modules:
            patch_base_class(sys.modules[name])
    patch_lavis(sys.modules["lavis.models"])


@contextmanager
def loading_models(name: str) -> Iterator[None]:
    """Surrounds the execution of ``lavis.models``."""
    patch_transformers()
    with without_timms_warning(), _stand_ins(OPTIONAL_PACKAGES):
        yield
    patch_lavis(sys.modules[name])


@contextmanager
def loading_base_class(name: str) -> Iterator[None]:
    """Surrounds the execution of one of `BASE_CLASSES`."""
    patch_transformers()
    yield
    patch_base_class(sys.modules[name])


@contextmanager
def without_timms_warning(name: str = "") -> Iterator[None]:
    """Hide timm's warning about old module names, which only LAVIS's authors could act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Importing from timm", category=FutureWarning)
        yield


def patch_transformers() -> None:
    """Add the names that LAVIS imports from transformers and that have moved or gone."""
    from transformers import modeling_utils, pytorch_utils

    _add(pytorch_utils, "find_pruneable_heads_and_indices", _dropped)
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        _add(modeling_utils, name, getattr(pytorch_utils, name))
    gone = "transformers.utils.model_parallel_utils"
    if gone not in sys.modules and importlib.util.find_spec(gone) is None:
        stub = ModuleType(gone, "Naive model parallelism, which transformers 5 has dropped.")
        stub.__dict__.update(assert_device_map=_dropped, get_device_map=_dropped)
        sys.modules[gone] = stub


def patch_base_class(module: ModuleType) -> None:
    """Give the base class of a module of `BASE_CLASSES` what transformers 5 expects of a model, or no longer has."""
    if (base := getattr(module, BASE_CLASSES[module.__name__], None)) is not None:
        _add(base, "all_tied_weights_keys", {})
        _add(base, "invert_attention_mask", _invert_attention_mask)
        _add(base, "get_head_mask", _get_head_mask)


def patch_lavis(models: ModuleType) -> None:
    """Complete LAVIS's own classes and functions, after ``lavis.models`` has been imported.

    - ``load_model`` and ``load_model_and_preprocess`` may be called without a model type. The defaults change in place,
      so that references imported earlier change too;
    - ``model_zoo`` shows the registry as it is, not as it was when ``lavis.models`` was imported.
    """
    for function in (models.load_model, models.load_model_and_preprocess):
        defaults = function.__defaults__ or ()
        if function.__code__.co_argcount - len(defaults) == 2:  # name and model_type are still required
            function.__defaults__ = (None, *defaults)
    # A data descriptor: it comes before the table that the instance made when it was built.
    type(models.model_zoo).model_zoo = property(_zoo_from_registry, lambda zoo, table: None)


def _add(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        setattr(owner, name, value)


@contextmanager
def _stand_ins(names: tuple[str, ...]) -> Iterator[None]:
    """Let ``import <name>`` succeed for absent packages; afterwards other libraries see that they are absent."""
    added = [name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None]
    sys.modules.update({name: _Absent(name) for name in added})
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


class _Absent(ModuleType):
    """A package that is not installed: using it raises, importing it does not."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise ImportError(f"this LAVIS model needs the package {self.__name__!r}: pip install {self.__name__}")


def _zoo_from_registry(zoo: Any) -> dict[str, list[str]]:
    from lavis.common.registry import registry

    models = registry.mapping["model_name_mapping"]
    return {name: list(model.PRETRAINED_MODEL_CONFIG_DICT) for name, model in models.items()}


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
