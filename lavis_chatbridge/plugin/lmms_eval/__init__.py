"""ChatBridge as a model of lmms-eval: ``lmms-eval --model chatbridge``.

lmms-eval finds it through the entry point ``lmms_eval.models``, which calls :func:`manifests`; this file therefore
imports nothing that is large.
"""

from __future__ import annotations

from typing import Any

from lavis_chatbridge.errors import ConfigError

_MODEL = "lavis_chatbridge.plugin.lmms_eval.model"


def manifests() -> Any:
    """The model's name, and a class for each of lmms-eval's two forms of requests.

    Raises:
        ConfigError: If lmms-eval is not installed, or is older than 0.7, which has no such entry points.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        raise ConfigError(
            "the adapter needs lmms-eval 0.7 or later, in an environment of its own beside this package: "
            f"pip install 'lmms-eval>=0.7' (found: {error})"
        ) from error
    return ModelManifest(
        "chatbridge", simple_class_path=f"{_MODEL}.ChatBridge", chat_class_path=f"{_MODEL}.ChatBridgeChat"
    )
