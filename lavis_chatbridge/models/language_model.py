"""Loads the frozen language model and its tokenizer from a folder, without network: any causal model of transformers.

This module handles embeddings and token ids, no media and no conversation format.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch

from lavis_chatbridge import hub
from lavis_chatbridge.errors import CheckpointError, ConfigError, MissingExtraError, one_line
from lavis_chatbridge.models import lora
from lavis_chatbridge.models.decoding import read
from lavis_chatbridge.models.families import LanguageModel, embedding_scale
from lavis_chatbridge.models.remote import load_remote
from lavis_chatbridge.models.settings import LanguageModelSettings, torch_dtype
from lavis_chatbridge.models.tokenizer import Tokenizer, load_tokenizer

TESTED = frozenset((
    "bloom", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "llama", "mistral",
    "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
))  # fmt: skip
"""Families (``model_type``) that pass every stage in tests/models/test_families.py; others are checked when loaded."""


def load_language_model(settings: LanguageModelSettings) -> tuple[LanguageModel, Tokenizer]:
    """The frozen language model, with new adapters if the settings name any, and its tokenizer.

    Raises:
        CheckpointError: If a folder is missing or incomplete, contains delta weights, or has another model's tokenizer.
        ConfigError: If the family of the language model is not supported, or a setting does not fit it.
    """
    from transformers import GenerationConfig

    check_available(settings)
    weights, named = settings.weights, settings.tokenizer or settings.weights
    folder = None if weights is None else hub.find(weights, "model.language_model.weights", "language_model")
    tokenizer = load_tokenizer(hub.find(named or (), "model.language_model.tokenizer", "tokenizer"))
    if settings.engine is not None and folder is not None:
        return load_remote(settings.engine, folder, tokenizer, torch_dtype(settings.dtype)), tokenizer
    model: Any = _random(settings) if folder is None else _pretrained(folder, settings)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer of {named} has {len(tokenizer)} tokens, but the language model of "
            f"{weights or 'the configuration'} embeds {rows}: they are of different models"
        )
    # ignore the folder's own generation settings: only the caller's arguments apply
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_id, pad_token_id=tokenizer.pad_id)
    model.requires_grad_(False).eval()
    if model.config.model_type not in TESTED:
        check_family(model)
    model.embedding_scale = embedding_scale(model)
    if settings.lora is not None:
        lora.inject(model, settings.lora)
    return model, tokenizer


def check_available(settings: LanguageModelSettings) -> None:
    """Raise a `MissingExtraError` if the settings need a package that is not installed."""
    needs = (
        ("lora", "peft", "lora"),
        ("device_map", "accelerate", "device-map"),
        ("quantization", "bitsandbytes", "quantize"),
        ("quantization", "accelerate", "quantize"),
    )
    for name, package, extra in needs:
        if getattr(settings, name) is not None and importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra, f"model.language_model.{name}")


def check_family(model: LanguageModel) -> None:
    """Raise a `ConfigError` if the bridge cannot use a language model.

    It must accept embeddings, and have a cache whose rows can be selected and do not affect each other.
    """
    try:
        stateful = getattr(model, "_is_stateful", False)  # without its kernels, such a model can take gigabytes to run
        fault = "it keeps a recurrent state, not keys and values" if stateful else _difference(model)
    except Exception as error:  # an unsupported model fails in its own way
        fault = f"{type(error).__name__}: {one_line(error, 150)}"
    if fault:
        family = getattr(model.config, "model_type", type(model).__name__)
        raise ConfigError(
            f"language models of family {family!r} are not supported ({fault}); docs/weights.md lists supported ones"
        )


@torch.no_grad()
def _difference(model: LanguageModel) -> str:
    """Error text for an unsupported model, or "".

    A row of a padded batch, continued from a selection of its cache, must get the same logits as alone.
    """
    table = model.get_input_embeddings()
    device = table.weight.device
    alone = table(torch.arange(3, 11, device=device)[None] * 7 % model.config.vocab_size)
    expected = model(inputs_embeds=alone, use_cache=False, return_dict=True).logits[0, -2:].float()
    padded = torch.cat([alone.flip(1), torch.cat([torch.zeros_like(alone[:, :2]), alone[:, :-2]], 1)])
    mask = torch.ones(2, 10, dtype=torch.long, device=device)
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    _, cache = read(model, None, mask[:, :8], positions[:, :8], inputs_embeds=padded)
    if cache is None or not hasattr(cache, "batch_select_indices"):
        return "the rows of its cache cannot be selected"
    cache.batch_select_indices(torch.tensor([1], device=device))
    logits, _ = read(model, cache, mask[1:], positions[1:, 8:], inputs_embeds=alone[:, -2:])
    deviations = {torch.float32: 0.01, torch.float16: 0.1}.get(model.dtype, 0.3)
    allowed = deviations * float(expected.std().clamp(min=1e-6))
    difference = float((logits[0].float() - expected).abs().max())
    quantised = getattr(model.config, "quantization_config", None) is not None
    return "" if quantised or difference <= allowed else "a row's logits depend on the padding, the batch or the cache"


def _pretrained(folder: Path, settings: LanguageModelSettings) -> Any:
    from transformers import AutoModelForCausalLM

    if any("delta" in Path(name).name.lower() for name in hub.as_list(settings.weights or ())):
        raise CheckpointError(
            f"the name of {folder} suggests delta weights, differences to a LLaMA: add them to that LLaMA "
            "(python3 -m fastchat.model.apply_delta), and use the result"
        )
    options: dict[str, Any] = {"dtype": torch_dtype(settings.dtype), "device_map": settings.device_map}
    if settings.quantization is not None:
        options |= _quantised(settings)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # safetensors raises subclasses of Exception itself
        raise CheckpointError(
            f"cannot read a language model from {folder}: {one_line(error)}; set model.language_model.weights to a "
            "Hugging Face folder (config.json, tokenizer, weights)"
        ) from error
    model, loading = loaded
    missing = [name for name in loading["missing_keys"] if "inv_freq" not in name]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing from the weights in {folder}, such as {missing[0]}")
    if settings.device_map is not None:  # ChatBridge.to must not move it
        model._apply = lambda function, recurse=True: model
    # on a CPU with AVX512-BF16, bitsandbytes repacks 4-bit layers at their first run without gradients, and the new
    # layout has no backward: after a validation, gradients would silently skip these layers
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def _quantised(settings: LanguageModelSettings) -> dict[str, Any]:
    """Arguments that make transformers quantise layers when it loads them onto their device."""
    from transformers import BitsAndBytesConfig

    dtype, gpu = torch_dtype(settings.dtype), torch.cuda.is_available()
    if settings.quantization == "4bit":
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        config = BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=dtype)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
        # silence a warning at every matmul: LLM.int8 always rounds inputs to fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        if dtype == torch.float16 and not gpu:
            dtype = torch.float32  # on a CPU, LLM.int8 overwrites its fp16 inputs, which backward needs
    device_map = settings.device_map or {"": torch.cuda.current_device() if gpu else "cpu"}
    return {"quantization_config": config, "dtype": dtype, "device_map": device_map}


def _random(settings: LanguageModelSettings) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(settings.config or {})
    try:
        built = AutoConfig.for_model(config.pop("model_type", "llama"), **config)
        return AutoModelForCausalLM.from_config(built).to(torch_dtype(settings.dtype))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"model.language_model.config: {one_line(error)}") from error
