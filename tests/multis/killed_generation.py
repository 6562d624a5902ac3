"""A program for the kill test: runs a generation in a child, kills it with SIGKILL at random moments, lets one finish.

Everything is imported once and the children are forked, so that they reach their work within milliseconds.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import openai
import openai.resources.chat  # noqa: F401  # imported on first use otherwise, by every child anew

from lavis_chatbridge.multis import generate as stage
from lavis_chatbridge.multis.annotation import Annotation, MediumRef
from lavis_chatbridge.multis.endpoint import Endpoint, EndpointSettings
from lavis_chatbridge.multis.ledger import JOURNAL_NAME, Ledger
from lavis_chatbridge.multis.limits import Price
from lavis_chatbridge.multis.prompts import PromptBook

CONCURRENCY = 8
_BEGUN = 3000  # bytes of the journal: more than the records of the first requests that leave


def main(url: str, folder: str, count: str, kills: str, mode: str, seed: str) -> None:
    """Kill ``kills`` children while they work on ``count`` requests, then run to the end."""
    options = stage.GenerateSettings(kinds=["detail"], concurrency=CONCURRENCY, in_doubt=mode)  # type: ignore[arg-type]
    endpoint = EndpointSettings("m", url, timeout=1.5, store=mode == "recover")
    Endpoint(endpoint)
    items = [
        Annotation(f"item{n}", (MediumRef("audio", f"{n}.wav"),), sound_captions=(f"A bell rings {n} times.",))
        for n in range(int(count))
    ]
    plan = list(stage.plan(items, PromptBook(), options, endpoint))
    rng = random.Random(int(seed))
    killed = 0
    while killed < int(kills):
        before = _size(folder)
        child = os.fork()
        if child == 0:
            stage.generate(plan, folder, endpoint, Price(0, 0), options)
            os._exit(0)
        while _size(folder) < before + _BEGUN:
            time.sleep(0.005)  # a child that is killed before it works proves nothing
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        print("killed after", len(Ledger.read(Path(folder) / JOURNAL_NAME).answered), "answers", flush=True)
    print(stage.generate(plan, folder, endpoint, Price(0, 0), options))


def _size(folder: str) -> int:
    journal = Path(folder) / JOURNAL_NAME
    return journal.stat().st_size if journal.exists() else 0


if __name__ == "__main__":
    main(*sys.argv[1:])
