"""Frozen parts spread over processes whose batches need different numbers of passes: none waits for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lavis_chatbridge.media.types import AudioClips
from lavis_chatbridge.prompting import Message, Text, alignment_prompt, chat_prompt
from lavis_chatbridge.runners import distributed, parallel
from tests.models.building import small_model
from tests.runners.runner_parts import config, in_processes


def frames(*shape: int) -> Tensor:
    return torch.randn(*shape, 28, 28, generator=torch.Generator().manual_seed(sum(shape)))


def clips(count: int) -> AudioClips:
    bank = torch.randn(count, 48, 32, generator=torch.Generator().manual_seed(count))
    return AudioClips(bank, torch.full((count,), 48))


def batch(*samples: dict[str, Any]) -> dict[str, Any]:
    return {key: [sample.get(key, []) for sample in samples] for key in ("pieces", "image", "video", "audio")}


TALK = {"pieces": chat_prompt([Message("user", "Who are you?"), Message("assistant", "A bridge.")])}
PICTURE = {"image": [frames(3)], "pieces": alignment_prompt(["image"], "a red dog")}
CLIP = {"video": [frames(5, 3)], "pieces": alignment_prompt(["video"], "it runs")}
SOUND = {"audio": [clips(3)], "pieces": alignment_prompt(["audio"], "rain")}
NO_TARGET = {"image": [frames(3)], "pieces": [Text("a picture without a word to learn")]}

STEPS = [
    (batch(PICTURE, CLIP, SOUND), batch(TALK)),
    (batch(TALK), batch(SOUND, PICTURE)),
    (batch(NO_TARGET), batch(CLIP)),
    (batch(SOUND, SOUND), batch(CLIP, CLIP)),
]
"""For each step the batch of either process; with ``encoder_batch`` 2 they need 0 to 5 passes through an encoder."""


def outcome(model: Any, samples: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and every gradient of a batch."""
    model.zero_grad()
    loss = model(samples)["loss"]
    loss.backward()
    trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"loss": loss.detach(), **trained}


def build(golden: Path) -> Any:
    return small_model(golden / "tokenizer", encoder_batch=2).train()


def _on_a_rank(rank: int, golden: Path, folder: Path) -> None:
    run = config(folder, parallel="fsdp", timeout_minutes=1.0).run
    device = distributed.init(run)
    model = build(golden)
    parallel.prepare(model, run, device)
    results = [outcome(model, step[rank]) for step in STEPS]
    with parallel.whole(model), torch.no_grad():  # an evaluation: only one process has something to do
        results += [{"loss": model(STEPS[0][0])["loss"]}] if rank == 0 else []
    distributed.barrier()
    results.append(outcome(model, STEPS[0][rank]))
    torch.save(results, folder / f"{rank}.pt")
    distributed.close()


@pytest.fixture(scope="module")
def results(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("uneven")
    in_processes(_on_a_rank, 2, golden_dir, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_each_process_finds_the_losses_and_gradients_of_its_own_batch(results, golden_dir):
    model = build(golden_dir)
    for rank in (0, 1):
        found = [*results[rank][: len(STEPS)], results[rank][-1]]
        for samples, got in zip([step[rank] for step in [*STEPS, STEPS[0]]], found, strict=True):
            expected = outcome(model, samples)
            torch.testing.assert_close(got["loss"], expected["loss"], rtol=0, atol=1e-5)
            for name in expected.keys() & got.keys():
                torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
            learnt = {name for name, gradient in expected.items() if gradient.abs().max() > 0}
            assert learnt <= got.keys()


def test_while_the_weights_are_whole_no_process_waits_for_the_others(results, golden_dir):
    expected = outcome(build(golden_dir), STEPS[0][0])["loss"]
    torch.testing.assert_close(results[0][len(STEPS)]["loss"], expected, rtol=0, atol=1e-5)
