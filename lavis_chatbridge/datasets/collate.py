"""Items of a data set -> one batch: a dictionary of lists.

Nothing is stacked, because samples of a batch may have different numbers of media, frames and clips; and no key is
dropped, because every item must have the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lavis_chatbridge.errors import DataError

ITEM_KEYS = (
    "sample_id",
    "pieces",
    "image",
    "video",
    "audio",
    "text_output",
    "references",
    "answers",
    "facts",
    "task",
    "held_out",
    "meta",
)
"""The keys of every item beside ``source``; a batch has each as a list with one entry per sample."""


def collate(items: Sequence[Mapping[str, Any]], source: str = "") -> dict[str, Any]:
    """One batch.

    Args:
        items: What a data set returned, all from the same source.
        source: The source's name, needed when there is no item (all media of a batch were unreadable).

    Returns:
        Each key as a list in the order of ``items``; ``source`` as one string.

    Raises:
        DataError: If the items' keys or sources differ.
    """
    for item in items:
        if set(item) != set(items[0]):
            raise DataError(f"items of one batch have different keys: {sorted(set(item) ^ set(items[0]))}")
    sources = {item["source"] for item in items} or {source}
    if len(sources) > 1:
        raise DataError(f"items of one batch come from different sources: {', '.join(sorted(sources))}")
    keys = [key for key in items[0] if key != "source"] if items else ITEM_KEYS
    batch: dict[str, Any] = {key: [item[key] for item in items] for key in keys}
    return batch | {"source": sources.pop()}
