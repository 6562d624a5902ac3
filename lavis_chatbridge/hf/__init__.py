"""transformers' interface to ChatBridge: config, model, processor, collator.

Importing this package registers them with transformers' Auto classes::

    from lavis_chatbridge.hf import ChatBridgeForConditionalGeneration, ChatBridgeProcessor

    model = ChatBridgeForConditionalGeneration.from_pretrained("tiny")
    processor = ChatBridgeProcessor.from_pretrained("tiny")
"""

import lavis  # noqa: F401  (the processors are in LAVIS's registry; its import applies the compatibility shims)
import transformers

from lavis_chatbridge.hf.configuration import ChatBridgeConfig
from lavis_chatbridge.hf.modeling import ChatBridgeForConditionalGeneration
from lavis_chatbridge.hf.processing import ChatBridgeCollator, ChatBridgeProcessor

__all__ = ["ChatBridgeCollator", "ChatBridgeConfig", "ChatBridgeForConditionalGeneration", "ChatBridgeProcessor"]

transformers.AutoConfig.register(ChatBridgeConfig.model_type, ChatBridgeConfig, exist_ok=True)
transformers.AutoProcessor.register(ChatBridgeConfig, ChatBridgeProcessor, exist_ok=True)
for _name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
    if (_auto := getattr(transformers, _name, None)) is not None:  # transformers 4.57 does not have the second
        _auto.register(ChatBridgeConfig, ChatBridgeForConditionalGeneration, exist_ok=True)
