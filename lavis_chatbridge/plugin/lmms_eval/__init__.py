"""ChatBridge as a model of lmms-eval, EvolvingLMMs-Lab's kit of benchmarks: ``lmms-eval --model chatbridge``.

lmms-eval finds it through the entry point ``lmms_eval.models``, which calls :func:`manifests`; this file therefore
imports nothing that is large. ``requests`` turns what lmms-eval asks into prompts, ``model`` answers.
"""

from __future__ import annotations

from typing import Any

from lavis_chatbridge.errors import ConfigError

NAME = "chatbridge"
_MODEL = "lavis_chatbridge.plugin.lmms_eval.model"


def manifests() -> Any:
    """What lmms-eval needs to know: the name, and a class for each of its two ways of asking.

    Raises:
        ConfigError: If lmms-eval is not installed, or is older than 0.7, which has no such entry points.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        raise ConfigError(missing(error)) from error
    return ModelManifest(NAME, simple_class_path=f"{_MODEL}.ChatBridge", chat_class_path=f"{_MODEL}.ChatBridgeChat")


def missing(error: ImportError) -> str:
    """What to do when lmms-eval cannot be imported."""
    return (
        "the adapter needs lmms-eval 0.7 or later, in an environment of its own beside this package: "
        f"pip install 'lmms-eval>=0.7' (found: {error})"
    )
