"""One evaluation as one of several processes; importable by a process that knows no test."""

from __future__ import annotations

from lavis_chatbridge.plugin.launch import launch


def evaluate(rank: int, cfg_path: str, options: list[str]) -> None:
    """Evaluate as a configuration file says; ``rank`` comes from the launcher's environment."""
    launch(cfg_path, options, evaluate=True)
