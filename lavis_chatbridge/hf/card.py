"""The model card (README.md) of a ChatBridge on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_chatbridge import __version__
from lavis_chatbridge.files import write_text

if TYPE_CHECKING:
    from lavis_chatbridge.hf.configuration import ChatBridgeConfig

_RECIPE = ("task", "max_iters", "max_epoch", "batch_size_train", "accum_grad_iters", "init_lr", "precision", "seed")
_LICENCES = {
    "vicuna": "LLaMA's licence",
    "qwen": "Apache-2.0",
    "smollm": "Apache-2.0",
    "siglip": "Apache-2.0",
    "whisper": "Apache-2.0",
}


def write(folder: Path, config: ChatBridgeConfig) -> None:
    """Write ``README.md``: the model, its parts and their licences, data, recipe and scores."""
    about = config.about
    parts = {setting: " or ".join(entry["source"]) for setting, entry in config.frozen.items()}
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: any-to-any",
        "tags: [chatbridge, image-text-to-text, video-text-to-text, audio-text-to-text]",
        "---",
        f"# ChatBridge ({config.model.get('model_type', 'own parts')})",
        "",
        "A bridge (arXiv 2305.16103) between frozen encoders of images, videos and sounds and a frozen language model.",
        f"Written by lavis-chatbridge {__version__}. Load it with `lavis_chatbridge.hf`:",
        "",
        "```python",
        "from lavis_chatbridge.hf import ChatBridgeForConditionalGeneration, ChatBridgeProcessor",
        "",
        'model = ChatBridgeForConditionalGeneration.from_pretrained("THIS_REPOSITORY")',
        'processor = ChatBridgeProcessor.from_pretrained("THIS_REPOSITORY")',
        "```",
        "",
        "## Frozen parts",
        "",
        *(
            _table(("part", "source", "licence"), [(k, v, _licence(v)) for k, v in parts.items()])
            or ["inside the weights"]
        ),
        "",
        "## Training data",
        "",
        *([f"- {name}" for name in about.get("data", ())] or ["not recorded"]),
        "",
        "## Recipe",
        "",
        *(_table(("setting", "value"), _chosen(about.get("recipe", {}))) or ["not recorded"]),
        "",
        "## Scores",
        "",
        *(_table(("data set", "score"), list(about.get("scores", {}).items())) or ["not measured"]),
    ]
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def _chosen(recipe: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, recipe[key]) for key in _RECIPE if recipe.get(key) is not None]


def _licence(source: str) -> str:
    return next((name for word, name in _LICENCES.items() if word in source.lower()), "see the source")


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    if not rows:
        return []
    return [_row(head), _row(("---",) * len(head)), *map(_row, rows)]


def _row(cells: tuple[Any, ...]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
