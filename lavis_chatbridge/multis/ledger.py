"""What the journal of a generation says: what was asked, answered, spent, and what a kill left in doubt.

A record's ``event`` is one of ``run`` (a start, with its settings), ``sent`` (on the disk before the request leaves),
``answer``, ``failed`` (one attempt) and ``gave_up`` (the last one). A request is in doubt from its ``sent`` on until an
``answer``, or a ``failed`` that says that it was certainly not paid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_chatbridge.multis.journal import read_journal

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True)
class Doubt:
    """A request that may have been answered and paid without our knowing: a kill, a timeout, a lost connection."""

    sent_at: float
    bound: float


@dataclass
class Ledger:
    """The state that a journal stands for.

    Attributes:
        answered: Ids of the requests that have an answer, as bytes (a run has many of them).
        doubts: Requests in doubt, by id.
        spent: US dollars; what may have been paid in doubt counts with its bound.
        events: How many records of each kind there are.
        prompt_tokens: As the server counted them, all answers together.
        completion_tokens: Likewise.
    """

    answered: set[bytes] = field(default_factory=set)
    doubts: dict[str, Doubt] = field(default_factory=dict)
    spent: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def read(cls, path: str | Path) -> Ledger:
        """The ledger of a journal file; an empty one where there is none."""
        ledger = cls()
        for record in read_journal(path):
            ledger.take(record)
        ledger.spent += sum(doubt.bound for doubt in ledger.doubts.values())
        return ledger

    def take(self, record: Mapping[str, Any]) -> None:
        """Account for one record; ``spent`` leaves out what is still in doubt."""
        event, request = record.get("event"), str(record.get("id", ""))
        self.events[str(event)] += 1
        if event == "sent":
            lost = self.doubts.pop(request, None)
            self.spent += lost.bound if lost else 0.0  # asked again: the first time may have been paid as well
            self.doubts[request] = Doubt(float(record.get("at", 0.0)), float(record.get("bound", 0.0)))
        elif event == "answer" or (event == "failed" and not record.get("paid")):
            self.doubts.pop(request, None)
        if event == "answer":
            self.spent += float(record.get("cost") or 0.0)
            self.answered.add(bytes.fromhex(request))
            self.prompt_tokens += int(record.get("prompt_tokens") or 0)
            self.completion_tokens += int(record.get("completion_tokens") or 0)


def answers(path: str | Path) -> Iterator[dict[str, Any]]:
    """The answers of a journal, each request's first one, in the order in which they came.

    Args:
        path: The journal, or the folder of a generation.
    """
    path = Path(path)
    seen: set[bytes] = set()
    for record in read_journal(path / JOURNAL_NAME if path.is_dir() else path):
        if record.get("event") == "answer":
            request = bytes.fromhex(str(record["id"]))
            if request not in seen:
                seen.add(request)
                yield record
