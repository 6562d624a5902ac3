"""What may be spent and how fast: token estimates, prices, a budget that is never exceeded, and a rate limit.

Nothing here knows HTTP or prompts.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from lavis_chatbridge import config as settings
from lavis_chatbridge.errors import ConfigError

_TOKEN = re.compile(r"[^\W\d_]{1,7}|\d{1,3}|\n|[^\w\s]")
_TOKENS_PER_MESSAGE = 8  # role and separators; providers state 3 to 7
_MILLION = 1_000_000


def estimate_tokens(messages: Iterable[Mapping[str, str]]) -> int:
    """About how many tokens a chat has: words (long ones count twice), groups of three digits, signs."""
    return sum(len(_TOKEN.findall(message["content"])) + _TOKENS_PER_MESSAGE for message in messages)


def bound_tokens(messages: Iterable[Mapping[str, str]]) -> int:
    """How many tokens a chat has at most: no token of a byte-level tokenizer is shorter than a byte."""
    return sum(len(message["content"].encode()) + _TOKENS_PER_MESSAGE for message in messages)


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars for one request."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / _MILLION


def price_of(model: str, table: str | Path | None = None) -> Price:
    """The price of a model.

    Args:
        model: Its name; the longest name of the table that it begins with counts.
        table: A YAML file ``name: {input: ..., output: ...}``; the package's own by default.

    Raises:
        ConfigError: If the table is not of that form, or has no such model.
    """
    file = Path(table) if table else Path(__file__).with_name("prices.yaml")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the price table {file}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a mapping of model names to prices")
    known = [str(name) for name in values if model == str(name) or model.startswith(f"{name}-")]
    if not known:
        raise ConfigError(
            f"no price for the model {model!r} in {file} (known: {', '.join(map(str, values))}); write a table "
            f"'{model}: {{input: ..., output: ...}}' in US dollars per million tokens and pass it with --prices, or "
            "name a listed price with --price-of (local costs nothing)"
        )
    name = max(known, key=len)
    return settings.parse(Price, values[name], name)


class Budget:
    """Money: what was spent, and what requests under way may cost at most. Their sum never exceeds the limit.

    Args:
        limit: In US dollars; None for no limit.
        spent: What earlier runs spent.
    """

    def __init__(self, limit: float | None = None, spent: float = 0.0) -> None:
        self.limit = limit
        self.spent = spent
        self.reserved = 0.0
        self._reservations = 0
        self._changed = asyncio.Event()

    async def reserve(self, bound: float) -> bool:
        """Set ``bound`` aside; waits while requests under way might free enough. False if the budget forbids it."""
        while self.limit is not None and self.spent + self.reserved + bound > self.limit:
            if not self._reservations or self.spent + bound > self.limit:
                return False
            self._changed.clear()
            await self._changed.wait()
        self.reserved += bound
        self._reservations += 1
        return True

    def settle(self, bound: float, cost: float) -> None:
        """Replace a reservation by what the request did cost."""
        self._reservations -= 1
        self.reserved = self.reserved - bound if self._reservations else 0.0  # rounding must not accumulate
        self.spent += cost
        self._changed.set()


class RateLimit:
    """Spreads requests evenly over time, and holds all of them back when the server asks for a pause.

    Args:
        requests_per_minute: None for no limit.
        tokens_per_minute: Of prompt and longest answer together; None for no limit.
    """

    def __init__(self, requests_per_minute: float | None = None, tokens_per_minute: float | None = None) -> None:
        self._request_time = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._token_time = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._free_at = 0.0
        self._paused_until = 0.0

    async def admit(self, tokens: int) -> None:
        """Wait for the next free place in time."""
        start = max(time.monotonic(), self._free_at)
        self._free_at = start + max(self._request_time, tokens * self._token_time)
        while (wait := start - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        await self.resume()

    async def resume(self) -> None:
        """Wait until a pause is over."""
        while (wait := self._paused_until - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    def pause(self, seconds: float) -> None:
        """Let nothing start for so long."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)
