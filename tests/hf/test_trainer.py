"""Five steps of transformers' Trainer equal five steps of LAVIS's runner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import Trainer, TrainingArguments

from lavis_chatbridge import cli
from lavis_chatbridge.hf import ChatBridgeCollator, ChatBridgeForConditionalGeneration, ChatBridgeProcessor
from lavis_chatbridge.models import state_dicts
from tests.chat.building import picture
from tests.runners.runner_parts import logged

STEPS, REPLY = 5, "a large red star on the left"
CONFIG = """
model: {{model_type: tiny}}
datasets:
  chatbridge_jsonl:
    {{stage: instruction, templates: false, splits: {{train: {folder}/data.jsonl}},
      vis_processor: {{train: {{name: chatbridge_image_eval, image_size: 56}}}}}}
run:
  {{task: chatbridge_instruction, max_iters: 5, batch_size_train: 1, init_lr: 1e-3, min_lr: 1e-3, warmup_steps: 0,
    weight_decay: 0.0, clip_grad_norm: null, num_workers: 0, device: cpu, log_every: 1, output_dir: {folder}/run,
    job_id: ""}}
"""


def test_five_steps_are_equal(tmp_path: Path) -> None:
    """The runner divides gradients by the number of targets, the Trainer the loss: the same bits for a power of two."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    turns = [{"role": "user", "text": "what is it?"}, {"role": "assistant", "text": REPLY}]
    sample = {"id": "a", "media": [{"type": "image", "path": "a.png"}], "turns": turns}
    (tmp_path / "data.jsonl").write_text(json.dumps(sample) + "\n")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    assert cli.main(["train", "--cfg-path", str(tmp_path / "run.yaml")]) == 0
    model = ChatBridgeForConditionalGeneration.from_pretrained("tiny")
    losses: list[float] = []  # the Trainer's log rounds them
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.item()))
    question = [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": REPLY}]
    arguments = TrainingArguments(
        str(tmp_path / "hf"), max_steps=STEPS, per_device_train_batch_size=1, learning_rate=1e-3, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to=[], remove_unused_columns=False,
        use_cpu=True, adam_epsilon=1e-8, optim="adamw_torch", disable_tqdm=True,
    )  # fmt: skip
    collator = ChatBridgeCollator(ChatBridgeProcessor.from_pretrained("tiny"))
    Trainer(model, arguments, collator, [{"messages": messages}] * STEPS).train()
    assert losses == pytest.approx(logged(tmp_path / "run", "train_loss"), abs=1e-6)
    assert len(losses) == STEPS
    trained = state_dicts.read(tmp_path / "run" / "model.safetensors").tensors
    found = model.chatbridge.trainable_state_dict()
    assert found.keys() == trained.keys()
    worst = {name: float((tensor - trained[name]).abs().max()) for name, tensor in found.items()}
    assert max(worst.values()) < 1e-6, worst
