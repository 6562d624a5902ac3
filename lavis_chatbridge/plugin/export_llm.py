"""``chatbridge export-llm``: the language model, LoRA merged, as a folder that transformers and vLLM load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavis_chatbridge import hub
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.files import atomic_folder
from lavis_chatbridge.plugin.launch import Options

if TYPE_CHECKING:
    from lavis_chatbridge.models.chatbridge import ChatBridge


def command(
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    model: Annotated[str, typer.Option(help="tiny, small, qwen3_8b, vicuna7b, vicuna13b, or a YAML.")] = "tiny",
    options: Options = None,
) -> None:
    """Write the language model in Hugging Face's layout, with LoRA adapters merged into its weights."""
    from lavis_chatbridge.chat.session import load_model

    if out.exists():
        raise ConfigError(f"{out} exists: name a new folder")
    built, _ = load_model(model, options or (), "cpu")
    export(built, out)
    print(f"{out}: AutoModelForCausalLM.from_pretrained loads it; vllm serve {out} --enable-prompt-embeds serves it")


def export(model: ChatBridge, out: Path) -> None:
    """Write a ChatBridge's language model and tokenizer to a new folder; its adapters are merged in place."""
    from lavis_chatbridge.models import lora

    llm: Any = model.llama_model
    settings = model.settings.language_model
    if not hasattr(llm, "save_pretrained") or settings.quantization is not None:
        raise ConfigError("a quantised or remote language model is not exported: set quantization and engine to null")
    lora.merge(llm)
    with atomic_folder(out) as target:
        for file in hub.require_files(model.llama_tokenizer.folder, "tokenizer"):
            shutil.copy(file, target)
        llm.generation_config.eos_token_id = sorted(model.template.end_ids) or None
        llm.save_pretrained(target)  # replaces the model's configurations, which stand beside the tokenizer
