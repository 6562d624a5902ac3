"""Prices of language models, from ``prices.yaml`` or a table in the same form."""

from __future__ import annotations

from pathlib import Path

from lavis_chatbridge.config import Settings, parse, read_yaml
from lavis_chatbridge.errors import ConfigError


class Price(Settings):
    """US dollars per million tokens."""

    input: float
    output: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Cost of a request in US dollars."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1_000_000


def price_of(model: str, table: str | Path | None = None) -> Price:
    """The price of the longest entry of a table (by default ``prices.yaml``) that is a prefix of the model's name.

    Raises:
        ConfigError: If the table is malformed or has no such model.
    """
    prices = {str(name): price for name, price in read_yaml(table or Path(__file__).with_name("prices.yaml")).items()}
    known = [name for name in prices if model == name or model.startswith(f"{name}-")]
    if not known:
        raise ConfigError(
            f"no price for the model {model!r} (known: {', '.join(prices)}): pass --prices with "
            f"'{model}: {{input: ..., output: ...}}' in US dollars per million tokens, or --price-of local"
        )
    name = max(known, key=len)
    return parse(Price, prices[name], name)
