"""Builds the embedded world on first use: a run on its data sets needs no other step before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def prepare(datasets_cfg: Mapping[str, Any]) -> None:
    """Build the world in the data root of each of its data sets that has none yet; one process does it for all.

    Raises:
        DataError: If a data root holds something else.
        ChatBridgeError: On the other processes, that of the main one.
    """
    from lavis_chatbridge.datasets.settings import WORLD_PREFIX, DataSettings
    from lavis_chatbridge.runners import distributed
    from lavis_chatbridge.toyworld.build import build_world, is_world

    sections = [section for name, section in datasets_cfg.items() if name.startswith(WORLD_PREFIX)]
    with distributed.together():  # the others wait for the main process here
        for root in dict.fromkeys(DataSettings(data_root=section.get("data_root")).root for section in sections):
            if distributed.is_main() and not is_world(root):
                build_world(root)
