"""``model.language_model.device_map``: the same answers, refused where it cannot be."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lavis_chatbridge import config as settings_reader
from lavis_chatbridge.errors import ConfigError, MissingExtraError
from lavis_chatbridge.models import language_model
from lavis_chatbridge.models.settings import LanguageModelSettings

TINY = "package:assets/tiny/llm"


def test_a_spread_model_computes_the_same_and_stays_where_it_is() -> None:
    whole, codec = language_model.load_language_model(LanguageModelSettings(weights=TINY))
    spread, _ = language_model.load_language_model(LanguageModelSettings(weights=TINY, device_map="auto"))
    ids = torch.tensor([codec.encode("what is the colour of the picture?")])
    with torch.no_grad():
        logits = [model(ids.to(model.device)).logits.cpu() for model in (whole, spread)]
    torch.testing.assert_close(logits[1], logits[0])
    nn.ModuleList([whole, spread]).to(torch.float64)
    assert {tensor.dtype for tensor in whole.parameters()} == {torch.float64}
    assert {tensor.dtype for tensor in spread.parameters()} == {torch.float32}


def test_without_accelerate_the_extra_is_named_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    absent = lambda name, *more: None if name == "accelerate" else real(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    monkeypatch.setattr(language_model, "load_codec", lambda *_folder: pytest.fail("something was loaded"))
    with pytest.raises(MissingExtraError, match=r"language_model.device_map needs .*extra 'device-map'"):
        language_model.load_language_model(LanguageModelSettings(weights=TINY, device_map="balanced"))


@pytest.mark.parametrize(
    ("places", "named"), [({"a": 0, "b": "cpu"}, "cpu"), ({"a": "cpu", "b": "disk"}, "cpu and disk")]
)
def test_parts_that_do_not_fit_are_refused(places: dict[str, Any], named: str) -> None:
    model = SimpleNamespace(hf_device_map=places)
    with pytest.raises(ConfigError, match=f"device_map is auto, but .* parts would stay on {named}. Use more devices"):
        language_model._keep_in_place(model, LanguageModelSettings(weights=TINY, device_map="auto"))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"config": {}, "tokenizer": "t", "device_map": "auto"}, "device_map is auto, but weights is null"),
        ({"weights": "w", "device_map": "automatic"}, "did you mean 'auto'"),
    ],
)
def test_what_makes_no_sense_is_a_fault(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        settings_reader.parse(LanguageModelSettings, values, "language_model")
