"""LAVIS on today's libraries: what the shims compute, and that they replace nothing and may be applied again."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from lavis_chatbridge.plugin import compat

lavis_models = pytest.importorskip("lavis.models")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inverted_mask_adds_nothing_where_tokens_count(dtype):
    model = SimpleNamespace(dtype=dtype)
    lowest = torch.finfo(dtype).min
    inverted = compat._invert_attention_mask(model, torch.tensor([[1, 1, 0]]))
    assert inverted.shape == (1, 1, 1, 3)
    assert inverted.flatten().tolist() == [0.0, 0.0, lowest]
    assert compat._invert_attention_mask(model, torch.ones(2, 4, 3)).shape == (2, 1, 4, 3)


def test_applying_again_changes_nothing():
    from transformers import modeling_utils

    before = modeling_utils.apply_chunking_to_forward, lavis_models.load_model.__defaults__
    compat.apply()
    assert (modeling_utils.apply_chunking_to_forward, lavis_models.load_model.__defaults__) == before
    assert lavis_models.load_model.__defaults__ == (None, False, "cpu", None)
    assert lavis_models.load_model_and_preprocess.__defaults__ == (None, False, "cpu")


def test_model_zoo_shows_the_registry_as_it_is(monkeypatch):
    from lavis.common.registry import registry

    late = SimpleNamespace(PRETRAINED_MODEL_CONFIG_DICT={"small": "", "large": ""})
    count = len(lavis_models.model_zoo)
    monkeypatch.setitem(registry.mapping["model_name_mapping"], "late_model", late)
    assert dict(lavis_models.model_zoo)["late_model"] == ["small", "large"]
    assert len(lavis_models.model_zoo) == count + 2
    assert "late_model" in str(type(lavis_models.model_zoo)())


def test_a_stand_in_imports_and_says_what_is_missing_when_used():
    with compat._stand_ins(("no_such_package_of_lavis",)):
        import no_such_package_of_lavis as absent

        with pytest.raises(ImportError, match="pip install no_such_package_of_lavis"):
            absent.load("en_core_web_sm")
    assert "no_such_package_of_lavis" not in sys.modules
