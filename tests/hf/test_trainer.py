"""Five steps of transformers' Trainer equal five steps of LAVIS's runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor
from transformers import Trainer, TrainingArguments

from lavis_chatbridge import cli
from lavis_chatbridge.hf import ChatBridgeCollator, ChatBridgeForConditionalGeneration, ChatBridgeProcessor
from lavis_chatbridge.models import state_dicts
from tests.chat.building import picture

STEPS, RATE, REPLY = 5, 1e-3, "a large red star on the left"
CONFIG = """
model: {{model_type: tiny}}
datasets:
  chatbridge_jsonl:
    stage: instruction
    templates: false
    splits: {{train: {data}}}
    vis_processor: {{train: {{name: chatbridge_image_eval, image_size: 56}}}}
run:
  task: chatbridge_instruction
  max_iters: {steps}
  batch_size_train: 1
  init_lr: {rate}
  min_lr: {rate}
  warmup_steps: 0
  weight_decay: 0.0
  clip_grad_norm: null
  num_workers: 0
  device: cpu
  log_every: 1
  output_dir: {output}
  job_id: ""
"""


class Recording(Trainer):
    """Keeps each step's loss, which the Trainer's log rounds."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.losses: list[float] = []
        self.targets: set[int] = set()

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *arguments: Any, **more: Any) -> Any:
        loss = super().compute_loss(model, inputs, *arguments, **more)
        self.losses.append(loss.item())
        self.targets.add(int((inputs["labels"] != -100).sum()))
        return loss


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One sample, so that both loops see the same batch in each step."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    turns = [{"role": "user", "text": "what is it?"}, {"role": "assistant", "text": REPLY}]
    line = {"id": "a", "media": [{"type": "image", "path": "a.png"}], "turns": turns}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path / "data.jsonl"


def test_five_steps_are_equal(tmp_path: Path, data: Path) -> None:
    """The runner divides gradients by the number of targets, the Trainer the loss: the same bits for a power of two."""
    output = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(CONFIG.format(data=data, steps=STEPS, rate=RATE, output=output))
    assert cli.main(["train", "--cfg-path", str(tmp_path / "run.yaml")]) == 0
    lines = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    expected = [line["train_loss"] for line in lines if "train_loss" in line]

    model = ChatBridgeForConditionalGeneration.from_pretrained("tiny")
    processor = ChatBridgeProcessor.from_pretrained("tiny")
    question = [{"type": "image", "path": str(data.parent / "a.png")}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": REPLY}]
    arguments = TrainingArguments(
        str(tmp_path / "hf"), max_steps=STEPS, per_device_train_batch_size=1, learning_rate=RATE, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to=[], remove_unused_columns=False,
        use_cpu=True, adam_epsilon=1e-8, optim="adamw_torch", disable_tqdm=True,
    )  # fmt: skip
    trainer = Recording(model, arguments, ChatBridgeCollator(processor), [{"messages": messages}] * STEPS)
    trainer.train()
    assert trainer.losses == pytest.approx(expected, abs=1e-6)
    trained = state_dicts.read(output / "model.safetensors").tensors
    found = model.chatbridge.trainable_state_dict()
    assert found.keys() == trained.keys()
    worst = {name: float((tensor - trained[name]).abs().max()) for name, tensor in found.items()}
    assert max(worst.values()) < 1e-6, worst
