"""The configuration of a ChatBridge in a Hugging Face folder: its ``model`` and ``preprocess`` sections.

A folder contains the bridge. The frozen parts (encoders, language model) are references: a hub id, or a path relative
to the folder, with a hash of the file used in training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from lavis_chatbridge import __version__, hub
from lavis_chatbridge.config import merged, parse, read_yaml
from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.files import hash_of, hash_of_file, read_lines
from lavis_chatbridge.models import weights
from lavis_chatbridge.models.settings import ModelSettings

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from omegaconf import DictConfig
    from torch import Tensor

CONFIG, RUN_CONFIG, RUN_LOG = "config.json", "config.yaml", "log.txt"
FROZEN = (("vision", "weights"), ("audio", "weights"), ("language_model", "weights"), ("language_model", "tokenizer"))
"""Keys of the ``model`` section that name frozen parts."""
_HASHED_WHOLE = 1 << 30
_RECIPE = ("task", "max_iters", "max_epoch", "batch_size_train", "accum_grad_iters", "init_lr", "precision", "seed")
_LICENCES = {"vicuna": "LLaMA's licence", **dict.fromkeys(("qwen", "smollm", "siglip", "whisper"), "Apache-2.0")}


class ChatBridgeConfig(PretrainedConfig):
    """The sections ``model`` and ``preprocess`` of a configuration (docs/training.md), and transformers' own settings.

    ``frozen`` has ``{"source", "hash"}`` of each frozen part by its setting (no hash if the file is not on this disk);
    ``about`` has facts for the model card: ``data``, ``recipe``, ``scores``.
    """

    model_type = "chatbridge"

    def __init__(
        self,
        model: Mapping[str, Any] | None = None,
        preprocess: Mapping[str, Any] | None = None,
        frozen: Mapping[str, Mapping[str, Any]] | None = None,
        about: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self.model = dict(model or {})
        self.preprocess = dict(preprocess or {})
        self.frozen = dict(frozen or {})
        self.about = dict(about or {})
        super().__init__(**more)

    @classmethod
    def find(cls, name: str | Path, revision: str | None = None) -> tuple[ChatBridgeConfig, Path | None]:
        """The configuration of a model, and its folder (None for a model type of the package).

        Raises:
            CheckpointError: If there is no such folder or repository, or it is not a ChatBridge.
        """
        folder = Path(name).expanduser()
        if not folder.is_dir():
            if str(name) in weights.model_types():
                return cls._of_yaml(weights.config_path(str(name))), None
            folder = hub.snapshot(str(name), revision)
        if (folder / CONFIG).is_file():
            return cls.from_json_file(folder / CONFIG), folder
        if not (folder / RUN_CONFIG).is_file():
            raise CheckpointError(
                f"{folder} is not a ChatBridge: expected {CONFIG} (Hugging Face) or {RUN_CONFIG} (a training run)"
            )
        config = cls._of_yaml(folder / RUN_CONFIG)
        config.model |= {"checkpoint": str(folder.resolve() / "model.safetensors")}
        log = [json.loads(line) for _, line in read_lines(folder / RUN_LOG)] if (folder / RUN_LOG).is_file() else []
        last: dict[str, Any] = next((line for line in reversed(log) if "val_step" in line), {})  # validation
        numbers = {name: value for name, value in last.items() if isinstance(value, int | float)}
        config.about["scores"] = {name.removeprefix("val_"): value for name, value in numbers.items()}
        return config, folder

    @classmethod
    def _of_yaml(cls, path: Path) -> ChatBridgeConfig:
        from omegaconf import OmegaConf

        sections = read_yaml(path)
        model: Any = OmegaConf.to_container(sections.model, resolve=True)
        preprocess: Any = OmegaConf.to_container(sections.get("preprocess") or OmegaConf.create())  # with ${model....}
        run = sections.get("run") or {}
        recipe = {key: run[key] for key in _RECIPE if run.get(key) is not None}
        return cls(model, preprocess, about={"data": list(sections.get("datasets") or {}), "recipe": recipe})

    def sections(self, folder: Path | None = None, changes: Mapping[str, Any] | None = None) -> DictConfig:
        """The sections; relative references are resolved in ``folder``, ``changes`` are merged into ``model``."""
        model = merged(self.model, dict(changes or {}))
        for part, key in FROZEN:
            names = self.model.get(part, {}).get(key)
            if folder is not None and names is not None:
                local = {name: folder / name for name in hub.as_list(names)}
                # Links stay as they are: the hub's cache links to files without names.
                model[part][key] = [os.path.abspath(p) if p.exists() else name for name, p in local.items()]
        return merged({"model": model, "preprocess": self.preprocess})

    def settings(self, folder: Path | None = None, changes: Mapping[str, Any] | None = None) -> ModelSettings:
        """The ``model`` section as settings, with the arguments of `sections`."""
        return parse(ModelSettings, self.sections(folder, changes).model, "model")

    def with_references(self, folder: Path, settings: ModelSettings) -> ChatBridgeConfig:
        """A copy for saving in ``folder``: relative paths where possible, and the hashes of the frozen parts."""
        copy = type(self)(self.model, self.preprocess, self.frozen, self.about)
        copy.architectures = ["ChatBridgeForConditionalGeneration"]
        for need in weights.needs(settings.model_copy(update={"checkpoint": None})):
            _, part, key = need.setting.split(".")
            if (part, key) in FROZEN:
                references = []
                for name in hub.as_list(need.names):
                    local = None if name.startswith(hub.PACKAGE) else hub.parsed(name).path
                    if local is None or "$" in str(local):  # the latter: of a variable that is not set here
                        references.append(name)
                    else:
                        references.append(os.path.relpath(local.resolve(), folder.resolve()))
                copy.model[part] = {**copy.model.get(part, {}), key: references}
                path = hub.status(*need).path
                copy.frozen[need.setting] = {"source": references, **({"hash": content_hash(path)} if path else {})}
        copy.model["perceiver"] = {**copy.model.get("perceiver", {}), "weights": None}
        copy.model |= {"checkpoint": None}
        return copy

    def check_frozen(self, settings: ModelSettings) -> None:
        """Raise a `CheckpointError` if a frozen part differs from that used in training."""
        for need in weights.needs(settings):
            expected = self.frozen.get(need.setting, {}).get("hash")
            if expected is not None and content_hash(path := hub.find(*need)) != expected:
                raise CheckpointError(
                    f"{need.setting}: {path} is not what this bridge was trained with (its hash is not "
                    f"{expected[:12]}...): use {' or '.join(hub.as_list(need.names))} as published"
                )

    def write(self, folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str = "5GB") -> None:
        """Write a Hugging Face folder: the configuration, the tensors and a model card."""
        from huggingface_hub import save_torch_state_dict

        self.save_pretrained(folder)
        apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_torch_state_dict(apart, folder, max_shard_size=max_shard_size)
        self._card().save(folder / "README.md")

    def _card(self) -> ModelCard:
        """The model card: the parts and their licences, data, recipe and scores."""
        from huggingface_hub import ModelCard, ModelCardData

        tags = ["chatbridge", "image-text-to-text", "video-text-to-text", "audio-text-to-text"]
        parts = []
        for setting, entry in self.frozen.items():
            source = " or ".join(entry["source"])
            licence = next((name for word, name in _LICENCES.items() if word in source.lower()), "see the source")
            parts.append((setting, source, licence))
        return ModelCard.from_template(
            ModelCardData(library_name="transformers", pipeline_tag="any-to-any", tags=tags),
            template_path=str(Path(__file__).with_name("card.md")),
            name=self.model.get("model_type", "own parts"),
            version=__version__,
            parts=parts,
            data=self.about.get("data", []),
            recipe=list(self.about.get("recipe", {}).items()),
            scores=list(self.about.get("scores", {}).items()),
        )


def content_hash(path: Path) -> str:
    """A hash of weights: of a file's bytes, or of a folder's small files and the names and sizes of its large ones."""
    if path.is_file():
        return hash_of_file(path)
    listed = sorted(file for file in path.iterdir() if file.is_file() and file.suffix != ".md")
    sizes = {file.name: file.stat().st_size for file in listed}
    return hash_of({f.name: hash_of_file(f) if sizes[f.name] < _HASHED_WHOLE else sizes[f.name] for f in listed})
