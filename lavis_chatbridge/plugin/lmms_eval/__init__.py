"""ChatBridge as a model of lmms-eval: ``lmms-eval --model chatbridge``.

lmms-eval finds it through the entry point ``lmms_eval.models``, which calls :func:`manifests`; this file therefore
imports nothing that is large.
"""

from __future__ import annotations

from typing import Any

_MODEL = "lavis_chatbridge.plugin.lmms_eval.model"


def manifests() -> Any:
    """The model's name, and a class for each of lmms-eval's two forms of requests."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "chatbridge", simple_class_path=f"{_MODEL}.ChatBridge", chat_class_path=f"{_MODEL}.ChatBridgeChat"
    )
