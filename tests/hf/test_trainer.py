"""Five steps of transformers' Trainer equal five steps of LAVIS's runner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments

from lavis_chatbridge import cli
from lavis_chatbridge.hf import ChatBridgeCollator, ChatBridgeForConditionalGeneration, ChatBridgeProcessor
from lavis_chatbridge.models import state_dicts
from tests.chat.building import picture

STEPS, RATE = 5, 1e-3
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


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args, state, control, logs=None, **more) -> None:
        if logs and "loss" in logs:
            self.seen.append(float(logs["loss"]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One sample, so that both loops see the same batch in each step."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    turns = [{"role": "user", "text": "what is it?"}, {"role": "assistant", "text": "a large red star"}]
    line = {"id": "a", "media": [{"type": "image", "path": "a.png"}], "turns": turns}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path / "data.jsonl"


def test_five_steps_are_equal(tmp_path: Path, data: Path) -> None:
    output = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(CONFIG.format(data=data, steps=STEPS, rate=RATE, output=output))
    assert cli.main(["train", "--cfg-path", str(tmp_path / "run.yaml")]) == 0
    lines = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    expected = [line["train_loss"] for line in lines if "train_loss" in line][:STEPS]

    model = ChatBridgeForConditionalGeneration.from_pretrained("tiny")
    processor = ChatBridgeProcessor.from_pretrained("tiny")
    question = [{"type": "image", "path": str(data.parent / "a.png")}, {"type": "text", "text": "what is it?"}]
    reply = {"role": "assistant", "content": "a large red star"}
    arguments = TrainingArguments(
        str(tmp_path / "hf"), max_steps=STEPS, per_device_train_batch_size=1, learning_rate=RATE, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[],
        remove_unused_columns=False, use_cpu=True, adam_epsilon=1e-8, optim="adamw_torch", disable_tqdm=True,
    )  # fmt: skip
    losses = Losses()
    samples = [{"messages": [{"role": "user", "content": question}, reply]}] * STEPS
    Trainer(model, arguments, ChatBridgeCollator(processor), samples, callbacks=[losses]).train()
    assert losses.seen == pytest.approx(expected, abs=1e-4), "the log rounds"
    trained = state_dicts.read(output / "model.safetensors").tensors
    # A gradient of zero is rounding noise, which AdamW scales to a full step: key biases have no other gradient.
    mine = {n: t for n, t in model.chatbridge.trainable_state_dict().items() if not n.endswith("key.bias")}
    far = sum(int(((tensor - trained[name]).abs() > 1e-6).sum()) for name, tensor in mine.items())
    assert far <= 1e-3 * sum(tensor.numel() for tensor in mine.values())
    again = ChatBridgeForConditionalGeneration.from_pretrained(output)
    assert torch.equal(again.chatbridge.llama_proj.weight, trained["llama_proj.weight"]), "a run's folder loads"
