"""The benchmark of loading compares what is alike: one model from both ways and layouts, and ratios to its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def test_every_way_loads_the_same_model_from_every_layout(benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    script = benchmark("loading")
    script.write_language_model(tmp_path, "tiny")
    for layout in ("safetensors", "bin"):
        folder = tmp_path / layout
        assert len(list(folder.glob(f"*.{layout}"))) == script.SHARDS
        first, second = (way(folder, "tiny").state_dict() for way in (script.plain, script.ours))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
        assert {tensor.dtype for tensor in second.values()} == {torch.bfloat16}
    script.write_encoders(tmp_path, "tiny")
    ours, *others = (way(tmp_path, "tiny").state_dict() for way in reversed(script.BRIDGE_WAYS.values()))
    for other in others:
        missing = {name.partition(".")[0] for name in ours.keys() - other.keys()}
        assert missing == {"audio_query_tokens", "audio_trans", "ln_audio", "llama_proj"}, "which no file gives"
        for name, tensor in other.items():
            assert torch.equal(tensor, ours[name]), name
            assert tensor.dtype == ours[name].dtype


def test_the_tables_have_ratios_to_the_models_and_to_the_plain_way(benchmark: Callable[[str], Any]) -> None:
    script = benchmark("loading")
    mib = 1 << 20
    rows = [
        script.Row("plain", "bin", 100 * mib, 400 * mib, 300 * mib, 2.0),
        script.Row("ours", "bin", 100 * mib, 120 * mib, 110 * mib, 1.0),
        script.Row("plain", script.BRIDGE, 200 * mib, 500 * mib, 600 * mib, 4.0),
        script.Row("ours", script.BRIDGE, 200 * mib, 250 * mib, 220 * mib, 3.0),
    ]
    table = script.table(rows, "tiny")
    assert "| bin | ours | 120 | 1.20 | 110 | 1.10 | 0.30 | 1.0 |" in table
    assert "A whole ChatBridge: 200 MiB." in table
    assert "| whole ChatBridge | ours | 250 | 1.25 | 220 | 1.10 | 0.50 | 3.0 |" in table
