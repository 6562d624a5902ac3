"""Settings: typed, every fault at once, the nearest known key named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from lavis_chatbridge.config import Settings, find_yaml, merged, parse, read_options, read_yaml
from lavis_chatbridge.errors import ConfigError


class Inner(Settings):
    rate: float = 0.5
    names: list[str] = []


class Outer(Settings):
    steps: int
    mode: Literal["fast", "slow"] = "fast"
    inner: Inner = Inner()
    maybe: Inner | None = None
    limit: int | None = None
    entry: str | list[str] | dict[str, str] | None = None
    ratios: dict[str, float] = {}

    def check(self) -> Iterator[str]:
        if self.limit is not None and self.limit < self.steps:
            yield f"limit {self.limit} is below steps {self.steps}"


def test_values_are_converted_and_nested() -> None:
    given = {"steps": 3, "inner": {"rate": "1e-4", "names": ["a"]}, "limit": None, "ratios": {"x": 2}}
    assert parse(Outer, given, "run") == Outer(steps=3, inner=Inner(rate=1e-4, names=["a"]), ratios={"x": 2.0})


def test_all_faults_come_together_with_the_nearest_key() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, {"stepps": 3, "mode": "fats", "inner": {"rate": "much"}, "limit": 1.5}, "run")
    message = str(caught.value)
    assert "unknown key run.stepps, did you mean 'steps'?" in message
    assert "run.steps is missing" in message
    assert "run.mode: 'fats' is not one of 'fast', 'slow', did you mean 'fast'?" in message
    assert "run.inner.rate: expected float, found 'much'" in message
    assert "run.limit: expected int, found 1.5" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"maybe": {"ratee": 1}}, "unknown key run.maybe.ratee, did you mean 'rate'?"),
        ({"entry": 3}, "run.entry: expected str, found 3"),
        ({"limit": 2}, "run: limit 2 is below steps 3"),
        ({"limit": True}, "run.limit: expected a number, found true"),
        ({"ratios": {"x": True, "y": 2}}, 'run.ratios: expected a number, found {"x": true, "y": 2}'),
        ({"inner": 7}, "run.inner: expected a mapping, found 7"),
        ({"inner": {"names": ["a", 7]}}, "run.inner.names[1]: expected str, found 7"),
    ],
)
def test_a_single_fault_is_one_sentence(given: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, {"steps": 3, **given}, "run")
    assert str(caught.value) == message


def test_options_are_a_mapping() -> None:
    assert read_options(["run.seed=1", "model.a=b"]) == {"run": {"seed": 1}, "model": {"a": "b"}}
    assert read_options(["run.job_id=123_4"]).run.job_id == "123_4"
    for wrong in (["run.seed"], ["run.seed=1", "model.a"]):
        with pytest.raises(ConfigError, match=r"^option '(run.seed|model.a)' has no value"):
            read_options(wrong)


def test_yaml_is_read_merged_and_resolved(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("run: {steps: 2, limit: '${run.steps}'}")
    config = merged(read_yaml(tmp_path / "a.yaml"), read_options(["run.steps=5"]))
    assert parse(Outer, config.run, "run").limit == 5
    for text in ("a: [", "- 1"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"a\.yaml"):
            read_yaml(tmp_path / "a.yaml")


def test_a_shipped_configuration_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_yaml("align").name == "align.yaml"
    assert find_yaml("projects/chatbridge/eval/okvqa.yaml").is_file()
    (tmp_path / "align").write_text("run: {}")
    assert find_yaml("align") == Path("align")
    with pytest.raises(ConfigError, match="no configuration file at algin; did you mean the shipped 'align'"):
        find_yaml("algin")
