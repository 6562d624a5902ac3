"""``python -m lavis.train`` and ``chatbridge train``: train as a configuration file says."""

from __future__ import annotations

from lavis_chatbridge.plugin.launch import CfgPath, Options, Session


def command(cfg_path: CfgPath, options: Options = None) -> None:
    """Train as a configuration file says."""
    with Session() as session:
        session.run(cfg_path, options or [], evaluate=False)
