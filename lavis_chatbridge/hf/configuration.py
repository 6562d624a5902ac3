"""The configuration of a ChatBridge in a Hugging Face folder: its ``model`` and ``preprocess`` sections.

A folder contains the bridge. The frozen parts (encoders, language model) are references: a hub id, or a path relative
to the folder, with a hash of the file used in training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lavis_chatbridge import hub
from lavis_chatbridge.config import merged, parse, read_yaml
from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.files import hash_of, hash_of_file
from lavis_chatbridge.models import weights
from lavis_chatbridge.models.settings import ModelSettings

CONFIG = "config.json"
RUN_CONFIG = "config.yaml"
FROZEN = (("vision", "weights"), ("audio", "weights"), ("language_model", "weights"), ("language_model", "tokenizer"))
"""Keys of the ``model`` section that name frozen parts."""
_HASHED_WHOLE = 1 << 30


class ChatBridgeConfig(PretrainedConfig):
    """Settings of a ChatBridge.

    Args:
        model: The ``model`` section of a configuration (docs/training.md).
        preprocess: The ``preprocess`` section.
        frozen: Setting -> ``{"source", "hash"}`` of each frozen part; without a hash if the file is not on this disk.
        about: Facts for the model card: ``data``, ``recipe``, ``scores``.
        **more: transformers' own settings.
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
    def of_type(cls, name: str) -> ChatBridgeConfig:
        """The configuration of a shipped model type.

        Raises:
            ConfigError: If there is no such type.
        """
        weights.model_settings(name)  # refuses an unknown name
        return cls._of_sections(read_yaml(weights.CONFIGS / f"chatbridge_{name}.yaml"))

    @classmethod
    def of_run(cls, folder: Path) -> ChatBridgeConfig:
        """The configuration of a folder that training wrote; its weights are the folder's ``model.safetensors``.

        Raises:
            ConfigError: If the folder has no readable ``config.yaml``.
        """
        config = cls._of_sections(read_yaml(folder / RUN_CONFIG))
        config.model |= {"checkpoint": str(folder.resolve() / "model.safetensors"), "load_finetuned": False}
        return config

    @classmethod
    def _of_sections(cls, config: Any) -> ChatBridgeConfig:
        from omegaconf import OmegaConf

        sections: Any = OmegaConf.to_container(merged(config), resolve=True)
        about = {"data": list(sections.get("datasets") or {}), "recipe": dict(sections.get("run") or {})}
        return cls(sections["model"], sections.get("preprocess"), about={k: v for k, v in about.items() if v})

    def settings(self, folder: Path | None = None, **changes: Any) -> ModelSettings:
        """The ``model`` section as settings.

        Args:
            folder: The folder that relative references are relative to.
            **changes: Dotted keys (with ``__`` for the dot) and their values.

        Raises:
            ConfigError: With all faults of the section.
        """
        model = merged(self.model)
        for part, key in FROZEN:
            names = self.model.get(part, {}).get(key)
            if folder is not None and names is not None:
                model[part][key] = [_absolute(name, folder) for name in hub.as_list(names)]
        for name, value in changes.items():
            model = merged(model, _nested(name.split("__"), value))
        return parse(ModelSettings, model, "model")

    def with_references(self, folder: Path, settings: ModelSettings) -> ChatBridgeConfig:
        """A copy for saving in ``folder``: relative paths where possible, and the hashes of the frozen parts."""
        copy = type(self)(**{key: value for key, value in self.to_dict().items() if key in _OWN})
        for need in weights.needs(settings.model_copy(update={"checkpoint": None, "pretrained": None})):
            _, part, key = need.setting.split(".")
            if (part, key) in FROZEN:
                references = [_relative(name, folder) for name in hub.as_list(need.names)]
                copy.model[part] = {
                    **copy.model.get(part, {}),
                    key: references if len(references) > 1 else references[0],
                }
                place = need.status().place
                hashed = {} if place is None else {"hash": content_hash(place)}
                copy.frozen[need.setting] = {"source": references, **hashed}
        copy.model["perceiver"] = {**copy.model.get("perceiver", {}), "weights": None}
        copy.model |= {"checkpoint": None, "finetuned": None, "load_finetuned": False, "pretrained": None}
        return copy

    def check_frozen(self, settings: ModelSettings) -> None:
        """Compare the frozen parts with those used in training.

        Raises:
            CheckpointError: If a part differs.
        """
        for need in weights.needs(settings):
            expected = self.frozen.get(need.setting, {}).get("hash")
            if expected is not None and content_hash(need.find()) != expected:
                raise CheckpointError(
                    f"{need.setting}: {need.find()} is not what this bridge was trained with (its hash is not "
                    f"{expected[:12]}...): use {' or '.join(hub.as_list(need.names))} as published"
                )


_OWN = ("model", "preprocess", "frozen", "about")


def content_hash(place: Path) -> str:
    """A hash of weights: of a file's bytes, or of a folder's small files and the names and sizes of its large ones."""
    if place.is_file():
        return hash_of_file(place)
    listed = sorted(file for file in place.iterdir() if file.is_file() and file.suffix != ".md")
    sizes = {file.name: file.stat().st_size for file in listed}
    return hash_of({f.name: hash_of_file(f) if sizes[f.name] < _HASHED_WHOLE else sizes[f.name] for f in listed})


def _absolute(name: str, folder: Path) -> str:
    inside = folder / name
    return os.path.abspath(inside) if inside.exists() else name  # links stay: the hub's cache links to nameless files


def _relative(name: str, folder: Path) -> str:
    """A local path relative to ``folder``; hub ids, URLs and parts of the package are unchanged."""
    path = hub.parsed(name, "model").path
    if path is None or name.startswith(hub.PACKAGE):
        return name
    return os.path.relpath(path.resolve(), folder.resolve())


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: value if len(keys) == 1 else _nested(keys[1:], value)}
