"""The ``run`` section of a YAML as a typed dataclass: every key that the training engine knows, with its default.

LAVIS's older names for some keys (`LAVIS_NAMES`) are accepted and translated, so that its YAMLs keep working.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lavis_chatbridge import config as settings
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.tasks.settings import EvaluationSettings

LAVIS_NAMES = {"log_freq": "log_every", "iters_per_inner_epoch": "eval_every", "resume_ckpt_path": "resume"}
"""LAVIS's name of a key -> ours, where only the name differs."""

IGNORED_LAVIS_KEYS = ("use_dist_eval_sampler", "dist_backend", "rank", "gpu", "lr_decay_rate")
"""Keys of LAVIS's YAMLs that decide nothing here: evaluation always shares samples exactly, the rest is found out."""

LONGEST_TIMEOUT = 365 * 24 * 60
"""In minutes: clocks hold no more than so many."""


@dataclass
class RunSettings(EvaluationSettings):
    """All keys of the ``run`` section; those of evaluation are in `EvaluationSettings`."""

    task: str = ""
    """Registered name of the task."""
    runner: str = "chatbridge_runner"
    """Registered name of the runner."""

    # ---- how long, and in what portions
    max_iters: int | None = None
    """Length of training in optimiser steps; give this or ``max_epoch``."""
    max_epoch: int | None = None
    """Length of training in passes over the mixture (the sum of all sources)."""
    batch_size_train: int = 32
    """Samples of one micro-batch on one process."""
    batch_size_eval: int = 32
    """Samples of one evaluation batch on one process."""
    accum_grad_iters: int = 1
    """Micro-batches of one optimiser step; all of them, on all processes, have the same source."""
    train_dataset_ratios: dict[str, float] | None = None
    """Share of the steps that each data set gets; null gives each one its share of all samples."""
    num_workers: int = 2
    """Processes that load data, per training process; 0 loads in the training process itself."""
    seed: int = 42
    """Seed of weights, order, augmentation and dropout."""
    max_bad_share: float = 0.05
    """Training stops when more than this share of a source's samples cannot be read."""
    batch_tokens: int | None = None
    """Size of a micro-batch in tokens instead of ``batch_size_train``; the count is then fixed per source."""
    group_by_length: bool = False
    """Put samples of similar length into a batch."""
    feature_cache: str | None = None
    """Folder of the frozen encoders' outputs, filled on first use and read afterwards; null always encodes."""

    # ---- optimisation
    init_lr: float = 1e-4
    """Learning rate after warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of training."""
    warmup_lr: float = 0.0
    """Learning rate at the first step of warm-up."""
    warmup_steps: int = 0
    """Length of the linear warm-up, in optimiser steps."""
    lr_sched: Literal["linear_warmup_cosine_lr", "original"] = "linear_warmup_cosine_lr"
    """Warm-up, then a cosine over the rest of training, both per step (LAVIS's scheduler of that name is per epoch).

    ``original`` is the original ChatBridge's: its ramp restarts with each epoch (``eval_every``)."""
    weight_decay: float = 0.05
    """AdamW's decay of matrices."""
    decay_all: bool = False
    """Decay biases and norms too, in one parameter group, as the original ChatBridge does."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's averaging factors."""
    clip_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; null never scales."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; trained weights and their optimiser stay in fp32."""
    max_nonfinite_steps: int = 20
    """Steps with a non-finite loss or gradient are skipped; training stops at this many."""

    # ---- evaluation
    evaluate: bool = False
    """Only evaluate ``test_splits``, without training."""
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    """Splits to train on."""
    valid_splits: list[str] = field(default_factory=list)
    """Splits to score during training; the best weights are kept by the first one's ``agg_metrics``."""
    test_splits: list[str] = field(default_factory=list)
    """Splits to score after training, with the best weights where ``valid_splits`` chose some."""
    eval_every: int | None = None
    """Steps between two validations; null validates once per epoch, or at the end when ``max_iters`` is given."""

    # ---- logs
    output_dir: str = "output"
    """Folder of all results, relative to the working directory."""
    job_id: str | None = None
    """Folder of this run under ``output_dir``; null makes a name of the time; an empty one is ``output_dir`` itself."""
    log_every: int = 50
    """Steps between two lines of the log."""
    tensorboard: bool = False
    """Write TensorBoard events to ``output_dir/tensorboard``."""
    wandb: bool = False
    """Write a Weights & Biases run (extra ``wandb``)."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """``offline`` keeps the run on disk, for ``wandb sync`` later."""
    wandb_project: str = "lavis-chatbridge"
    """Weights & Biases project."""

    # ---- checkpoints
    resume: str | None = None
    """A checkpoint to go on from; ``auto`` takes the newest sound one under ``output_dir``, if there is one."""
    anew: bool = False
    """Start anew where an earlier training lies, after moving its files to ``earlier/N``; else that is refused."""
    save_every_steps: int | None = None
    """Steps between two checkpoints; null saves at validations and at the end."""
    save_every_minutes: float | None = 30.0
    """Minutes between two checkpoints, beside ``save_every_steps``."""
    keep_last: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many steps stay for good."""

    # ---- machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes CUDA where there is one."""
    distributed: bool = True
    """Join the process group that torchrun or Slurm announces; without an announcement there is none."""
    dist_url: str = "env://"
    """Where the processes meet; Slurm's is worked out when this is ``env://`` and no MASTER_ADDR is set."""
    world_size: int = 1
    """Number of processes; filled in from torchrun or Slurm."""
    timeout_minutes: float = 30.0
    """A process that waits longer than this for another one ends the run."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """``fsdp`` spreads the frozen encoders and language model over the processes; trained weights are on each."""
    compile: bool = False
    """Compile the frozen blocks with ``torch.compile``."""
    gradient_checkpointing: bool = False
    """Recompute the language model's activations in the backward pass instead of keeping them."""

    def check(self) -> Iterable[str]:
        """Contradictions between the keys."""
        yield from super().check()
        if not self.task:
            yield "task is missing: name a registered task, such as chatbridge_alignment"
        if self.evaluate and not self.test_splits:
            yield "evaluate is set, but test_splits names no split"
        if not self.evaluate:
            yield from self._check_training()
        for name in (name for name, value in vars(self).items() if value in (math.inf, -math.inf)):
            yield f"{name} must be a finite number, found {getattr(self, name)}"
        if self.timeout_minutes > LONGEST_TIMEOUT:
            yield f"timeout_minutes is at most {LONGEST_TIMEOUT} (a year), found {self.timeout_minutes}"
        positive = [
            "batch_size_train",
            "batch_size_eval",
            "accum_grad_iters",
            "log_every",
            "keep_last",
            "timeout_minutes",
        ]
        optional = ["max_iters", "max_epoch", "eval_every", "save_every_steps", "save_every_minutes", "keep_every"]
        optional += ["clip_grad_norm", "batch_tokens"]
        for name in positive + [name for name in optional if getattr(self, name) is not None]:
            if getattr(self, name) <= 0:
                yield f"{name} must be positive, found {getattr(self, name)}"
        for name in ("num_workers", "weight_decay", "warmup_steps", "warmup_lr", "min_lr", "max_nonfinite_steps"):
            if getattr(self, name) < 0:
                yield f"{name} must not be negative, found {getattr(self, name)}"
        if not 0 <= self.max_bad_share <= 1:
            yield f"max_bad_share is a share between 0 and 1, found {self.max_bad_share}"
        if not 0 <= self.seed < 2**32:
            yield f"seed must lie between 0 and {2**32 - 1}, found {self.seed}"
        if self.anew and self.resume is not None:
            yield f"anew starts a new run and resume goes on with {self.resume}: choose one"
        if self.resume not in (None, "auto") and not Path(str(self.resume)).expanduser().exists():
            yield f"resume: no checkpoint at {self.resume}"
        if self.feature_cache is not None and Path(self.feature_cache).expanduser().is_file():
            yield f"feature_cache: expected a folder, found a file at {self.feature_cache}"

    def unknown_splits(self, there: Collection[str]) -> list[str]:
        """A sentence for each split that this run names and that is not among those ``there``."""
        kinds = ["test_splits"] if self.evaluate else ["train_splits", "valid_splits", "test_splits"]
        named = [(kind, split) for kind in kinds for split in getattr(self, kind)]
        names = ", ".join(sorted(there))
        return [
            f"run.{kind}: no data set has the split {split!r}; there are {names}"
            for kind, split in named
            if split not in there
        ]

    def _check_training(self) -> Iterable[str]:
        if (self.max_iters is None) == (self.max_epoch is None):
            yield "give either max_iters (optimiser steps) or max_epoch (passes over the data)"
        if not self.train_splits:
            yield "train_splits is empty"
        for name, ratio in (self.train_dataset_ratios or {}).items():
            if not 0 < ratio < math.inf:
                yield f"train_dataset_ratios.{name} must be positive, found {ratio}: leave the data set out instead"
        if self.max_iters is not None and self.warmup_steps > self.max_iters:
            yield f"warmup_steps {self.warmup_steps} is more than max_iters {self.max_iters}"
        if self.init_lr <= 0 or self.min_lr > self.init_lr or self.warmup_lr > self.init_lr:
            least = f"min_lr {self.min_lr} and warmup_lr {self.warmup_lr}"
            yield f"init_lr {self.init_lr} must be positive and no less than {least}"
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            yield f"betas are two numbers in [0, 1), found {list(self.betas)}"


def parse_run(values: Mapping[str, Any]) -> RunSettings:
    """The ``run`` section as settings.

    Raises:
        ConfigError: With every fault of the section at once.
    """
    translated, faults = _translate(values)
    try:
        parsed = settings.parse(RunSettings, translated, "run")
    except ConfigError as error:
        faults.append(str(error))
    if faults:
        raise ConfigError("; ".join(faults))
    return parsed


def _translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """LAVIS's names as ours, and the faults of that."""
    ours = {key: value for key, value in values.items() if key not in IGNORED_LAVIS_KEYS}
    faults: list[str] = []
    for theirs, name in LAVIS_NAMES.items():
        if theirs in ours:
            value = ours.pop(theirs)
            if ours.setdefault(name, value) != value:
                faults.append(f"run.{theirs} {value!r} is LAVIS's name of run.{name} {ours[name]!r}: give one")
    if isinstance(ours.get("job_id"), int) and not isinstance(ours["job_id"], bool):
        ours["job_id"] = str(ours["job_id"])
    if "amp" in ours:
        amp, precision = ours.pop("amp"), ours.get("precision")
        if amp and precision not in (None, "fp16"):
            faults.append(
                f"run.amp is LAVIS's name of precision fp16, but run.precision is {precision!r}: drop run.amp"
            )
        elif amp:
            ours["precision"] = "fp16"
    if "beta2" in ours:
        beta2 = ours.pop("beta2")
        if "betas" in ours:
            faults.append("run.beta2 is LAVIS's name of the second of run.betas: give one")
        else:
            ours["betas"] = [0.9, beta2]
    return ours, faults
