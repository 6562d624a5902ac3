"""The ``run`` section of a YAML: every key of the runner, with its default.

LAVIS's older names for some keys (`LAVIS_NAMES`) are accepted, so that its YAML files keep working.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from lavis_chatbridge.datasets.loader import LoaderSettings
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.tasks.settings import EvaluationSettings

LAVIS_NAMES = {"log_freq": "log_every", "iters_per_inner_epoch": "eval_every", "resume_ckpt_path": "resume"}
"""LAVIS's name of a key -> our name, for keys with the same meaning."""

IGNORED_LAVIS_KEYS = ("use_dist_eval_sampler", "dist_url", "dist_backend", "rank", "gpu", "world_size", "lr_decay_rate")
"""Keys of LAVIS's YAML files that have no effect here."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RunSettings(LoaderSettings, EvaluationSettings):
    """All keys of the ``run`` section; those of batches and of evaluation are in the classes that it extends."""

    task: str
    """Registered name of the task."""
    runner: str = "chatbridge_runner"
    """Registered name of the runner."""

    # ---- length and batches
    max_iters: PositiveInt | None = None
    """Length of training in optimiser steps; give this or ``max_epoch``."""
    max_epoch: PositiveInt | None = None
    """Length of training in epochs; one has as many samples as all data sets together."""
    batch_size_eval: PositiveInt = 32
    """Samples per evaluation batch and process."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Stop with an error if more than this share of a data set's samples is unreadable."""
    feature_cache: str | None = None
    """Folder that caches the frozen encoders' outputs, filled on first use; null: no cache."""

    # ---- optimisation
    train: list[str] | None = None
    """Parts of the bridge to train, such as ``[audio_queries, audio_trans]``; null trains all of it."""
    init_lr: Positive = 1e-4
    """Learning rate after warm-up."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of training."""
    warmup_lr: NotNegative = 0.0
    """Learning rate at the first step of warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Length of the linear warm-up, in optimiser steps."""
    lr_sched: Literal["linear_warmup_cosine_lr", "original"] = "linear_warmup_cosine_lr"
    """Default: warm-up, then a cosine. ``original``: the original ChatBridge's, with epochs of ``eval_every`` steps."""
    weight_decay: NotNegative = 0.05
    """AdamW's weight decay of matrices."""
    decay_all: bool = False
    """Decay biases and norms too, as the original ChatBridge does."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's betas."""
    clip_grad_norm: Positive | None = 1.0
    """Clip gradients to this norm; null does not clip."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of forward and backward; trained weights and optimiser state stay in fp32."""
    max_nonfinite_steps: PositiveInt = 20
    """Steps with a non-finite loss or gradient are skipped; stop with an error at this number."""

    # ---- evaluation
    evaluate: bool = False
    """Only evaluate ``test_splits``, without training."""
    train_splits: list[str] = ["train"]
    """Splits to train on."""
    valid_splits: list[str] = []
    """Splits to score during training; the first one's ``agg_metrics`` selects the best weights."""
    test_splits: list[str] = []
    """Splits to score after training, with the best weights if there are ``valid_splits``."""
    eval_every: PositiveInt | None = None
    """Steps between two validations; null: once per epoch, or at the end if ``max_iters`` is given."""

    # ---- logs
    output_dir: str = "output"
    """Folder of all results, relative to the working directory."""
    job_id: Annotated[str, Field(coerce_numbers_to_str=True)] | None = None
    """Folder of this run under ``output_dir``; null: named after the time; empty: ``output_dir`` itself."""
    log_every: PositiveInt = 50
    """Steps between two lines of the log."""
    tensorboard: bool = False
    """Write TensorBoard events (extra ``tensorboard``)."""
    wandb: bool = False
    """Write a Weights & Biases run (extra ``wandb``), on disk only unless WANDB_MODE is ``online``."""

    # ---- checkpoints
    resume: str | None = None
    """``auto``: resume from the newest checkpoint in the run's folder, if any; a path: from that checkpoint."""
    overwrite: bool = False
    """Delete an earlier run's files in the run's folder; without it, such files are an error."""
    save_every_steps: PositiveInt | None = None
    """Steps between two checkpoints; null: save at validations and at the end."""
    save_every_minutes: Positive | None = 30.0
    """Minutes between two checkpoints, in addition to ``save_every_steps``."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""

    # ---- machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA if torch finds a device, else CPU."""
    distributed: bool = True
    """Join the processes that torchrun or srun started; false ignores the launcher."""
    timeout_minutes: Annotated[float, Field(gt=0, le=365 * 24 * 60)] = 30.0
    """The run ends if a process waits longer than this for another one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """``fsdp`` shards the language model's blocks over the processes; each process has all other weights."""
    compile: bool = False
    """Compile the language model's blocks with ``torch.compile``."""
    gradient_checkpointing: bool = False
    """Recompute the language model's activations in backward instead of keeping them."""

    @model_validator(mode="before")
    @classmethod
    def _lavis_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Replace LAVIS's names by ours, which take precedence."""
        ours = {key: value for key, value in values.items() if key not in (*IGNORED_LAVIS_KEYS, *LAVIS_NAMES)}
        for theirs in LAVIS_NAMES.keys() & values.keys():
            ours.setdefault(LAVIS_NAMES[theirs], values[theirs])
        if ours.pop("amp", False):
            ours.setdefault("precision", "fp16")
        if (beta2 := ours.pop("beta2", None)) is not None:
            ours.setdefault("betas", [0.9, beta2])
        return ours

    def check(self) -> Iterable[str]:
        """Yield the contradictions between keys."""
        yield from super().check()
        if self.job_id == ".." or {"/", "\\"} & set(self.job_id or ""):
            yield f"job_id is {self.job_id!r}, expected a folder's name: other places are set by output_dir"
        if self.evaluate:
            if not self.test_splits:
                yield "evaluate is set, but test_splits names no split"
            if self.resume is not None:
                yield (
                    "resume is for training: set it to null; to evaluate a checkpoint, set model.checkpoint to its "
                    "model.safetensors"
                )
            return
        if (self.max_iters is None) == (self.max_epoch is None):
            yield "give either max_iters (optimiser steps) or max_epoch (passes over the data)"
        if not self.train_splits:
            yield "train_splits is empty"
        if self.max_iters is not None and self.warmup_steps > self.max_iters:
            yield f"warmup_steps {self.warmup_steps} is more than max_iters {self.max_iters}"
        if max(self.min_lr, self.warmup_lr) > self.init_lr:
            yield f"init_lr {self.init_lr} is less than min_lr {self.min_lr} or warmup_lr {self.warmup_lr}"
        if self.overwrite and self.resume == "auto":
            yield "overwrite deletes the earlier run that resume: auto would resume: choose one"
        if self.resume == "auto" and self.job_id is None:
            yield "resume: auto needs a job_id (empty: output_dir itself); null names a new folder at every start"

    @property
    def used_splits(self) -> list[str]:
        """The splits that this run reads."""
        return [*([] if self.evaluate else [*self.train_splits, *self.valid_splits]), *self.test_splits]

    def check_splits(self, known: Collection[str]) -> None:
        """Raise a `ConfigError` if a split of this run is not among the ``known`` ones."""
        if unknown := [split for split in self.used_splits if split not in known]:
            raise ConfigError(
                f"no data set has the split {', '.join(map(repr, unknown))} of run.train_splits, valid_splits or "
                f"test_splits; there are {', '.join(sorted(known))}"
            )
