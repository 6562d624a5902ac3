"""Settings: typed, every fault at once, the nearest known key named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import pytest

from lavis_chatbridge import settings
from lavis_chatbridge.errors import ConfigError


@dataclass
class Inner:
    rate: float = 0.5
    names: list[str] = field(default_factory=list)


@dataclass
class Outer:
    steps: int
    mode: Literal["fast", "slow"] = "fast"
    inner: Inner = field(default_factory=Inner)
    limit: int | None = None
    ratios: dict[str, float] = field(default_factory=dict)

    def check(self) -> Iterator[str]:
        if self.limit is not None and self.limit < self.steps:
            yield f"limit {self.limit} is below steps {self.steps}"


def test_values_are_converted_and_nested() -> None:
    built = settings.parse(
        Outer, {"steps": 3, "inner": {"rate": "1e-4", "names": ["a"]}, "limit": None, "ratios": {"x": 2}}, "run"
    )
    assert built == Outer(steps=3, inner=Inner(rate=1e-4, names=["a"]), ratios={"x": 2.0})
    assert isinstance(built.ratios["x"], float)


def test_all_faults_come_together_with_the_nearest_key() -> None:
    with pytest.raises(ConfigError) as caught:
        settings.parse(Outer, {"stepps": 3, "mode": "fats", "inner": {"rate": "much"}, "limit": 1.5}, "run")
    message = str(caught.value)
    assert "unknown key run.stepps, did you mean 'steps'?" in message
    assert "run.steps is missing" in message
    assert "run.mode: 'fats' is not one of 'fast', 'slow', did you mean 'fast'?" in message
    assert "run.inner.rate: expected float, found 'much'" in message
    assert "run.limit: expected int, found 1.5" in message


def test_a_bool_is_no_int() -> None:
    with pytest.raises(ConfigError, match=r"run\.steps: expected int, found True"):
        settings.parse(Outer, {"steps": True}, "run")


def test_a_contradiction_is_a_fault() -> None:
    with pytest.raises(ConfigError, match="run: limit 2 is below steps 3"):
        settings.parse(Outer, {"steps": 3, "limit": 2}, "run")


def test_a_section_must_be_a_mapping() -> None:
    with pytest.raises(ConfigError, match=r"run.inner: expected a mapping, found 7"):
        settings.parse(Outer, {"steps": 3, "inner": 7}, "run")


def test_settings_built_by_hand_are_checked_too() -> None:
    assert settings.checked(Outer(steps=3, limit=4)).limit == 4
    with pytest.raises(ConfigError, match="limit 2 is below steps 3"):
        settings.checked(Outer(steps=3, limit=2))
