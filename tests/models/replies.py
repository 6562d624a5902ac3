"""Tiny language models of any family, and replies to prompts of text and soft tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lavis_chatbridge.models.decoding import Decoder, Generation, Prefix
from lavis_chatbridge.models.families import embedding_scale
from lavis_chatbridge.models.layout import Element
from lavis_chatbridge.models.sampling import Sampling

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def tiny(model_type: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **more})
    model: Any = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.embedding_scale = embedding_scale(model)
    return model


class Letters:
    """A tokenizer whose text is the ids, a word each."""

    bos_id, eos_id, pad_id = 1, 2, 0
    byte_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return [3, 4, 5]

    def decode(self, ids: Any) -> str:
        return "".join(f"<{i}>" for i in ids)


def prompt(*lengths: int, seed: int = 0) -> tuple[list[Element], dict[str, torch.Tensor]]:
    """Text, a medium of three soft tokens, text."""
    chance = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 97, (length,), generator=chance).tolist() for length in lengths]
    elements: list[Element] = [*ids[0], *((f"m{seed}", i) for i in range(3)), *ids[1]]
    return elements, {f"m{seed}": torch.randn(3, 32, generator=chance) * 0.2}


def reply(elements: list[Element], media: Any, prefix: Prefix | None = None, tokens: int = 6, **how: Any) -> Generation:
    tokenizer: Any = Letters()
    sampling = Sampling(max_new_tokens=tokens, **how)
    return Generation(elements, media, tokenizer, sampling, end_ids=frozenset((2,)), prefix=prefix)


def answers(model: Any, replies: list[Generation]) -> list[list[int]]:
    Decoder(model).complete(replies)
    return [one.ids for one in replies]
