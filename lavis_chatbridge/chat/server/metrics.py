"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._times: dict[str, tuple[list[int], float]] = {}
        self._gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self._help: dict[str, str] = {}

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Let ``value`` be asked whenever somebody looks."""
        self._gauges[name] = (text, value)

    def describe(self, **texts: str) -> None:
        """What counters and histograms are about."""
        self._help |= texts

    def count(self, name: str, amount: float = 1, **labels: object) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name, _labels(labels)] += amount  # type: ignore[assignment]

    def time(self, name: str, seconds: float) -> None:
        """Add a duration to a histogram."""
        with self._lock:
            buckets, total = self._times.get(name) or ([0] * (len(_BOUNDS) + 1), 0.0)
            buckets[next((i for i, bound in enumerate(_BOUNDS) if seconds <= bound), len(_BOUNDS))] += 1
            self._times[name] = (buckets, total + seconds)

    def text(self) -> str:
        """All of it, one line per number."""
        lines: list[str] = []
        with self._lock:
            for name in sorted({name for name, _ in self._counts}):
                lines += self._head(name, "counter")
                lines += [f"{n}{labels} {_digits(v)}" for (n, labels), v in sorted(self._counts.items()) if n == name]
            for name, (buckets, total) in sorted(self._times.items()):
                lines += self._head(name, "histogram")
                for i, bound in enumerate((*_BOUNDS, "+Inf")):
                    lines.append(f'{name}_bucket{{le="{bound}"}} {sum(buckets[: i + 1])}')
                lines += [f"{name}_sum {_digits(total)}", f"{name}_count {sum(buckets)}"]
        for name, (text, value) in sorted(self._gauges.items()):
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{name} {_digits(value())}"]
        return "\n".join(lines) + "\n"

    def _head(self, name: str, kind: str) -> list[str]:
        return [f"# HELP {name} {self._help.get(name, name)}", f"# TYPE {name} {kind}"]


def _labels(labels: dict[str, object]) -> str:
    return "{" + ",".join(f'{key}="{value}"' for key, value in sorted(labels.items())) + "}" if labels else ""


def _digits(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.6f}"
