"""The runner: LAVIS's `RunnerBase` with a training loop that can stop and resume at any step.

It depends on no modality, prompt or data set.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.runners.runner_base import RunnerBase
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_chatbridge.config import parse
from lavis_chatbridge.datasets.loader import MixtureLoader, too_many_unreadable, worker_deaths
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError, TrainingError
from lavis_chatbridge.files import write_text
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners import checkpoints, data, distributed, logs
from lavis_chatbridge.runners.checkpoints import Checkpoint, SavedPlan, SavedState, TrainState
from lavis_chatbridge.runners.data import Datasets, LavisTrainLoader
from lavis_chatbridge.runners.folder import CONFIG, RESULTS, WEIGHTS, RunFolder
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import Samples, StepResult, TrainStep, autocast, learning_rate, sample_ids, seed_all
from lavis_chatbridge.tasks.base import ChatBridgeTask

_log = logging.getLogger(__name__)


@registry.register_runner("chatbridge_runner")
class ChatBridgeRunner(RunnerBase):
    """Trains and evaluates a model on a task, with the arguments of LAVIS's runners.

    ``cfg`` is a `runners.config.Config` or LAVIS's; ``job_id`` names the run's folder if ``run.job_id`` is null.
    """

    def __init__(self, cfg: Any, task: BaseTask, model: nn.Module, datasets: Datasets, job_id: str = "") -> None:
        self.run: RunSettings = getattr(cfg, "run", None) or parse(RunSettings, cfg.run_cfg, "run")
        self.run.check_splits({split for splits in datasets.values() for split in splits})
        self.state = TrainState()
        self.bridge = distributed.choose_trained(model, self.run.train)
        device = distributed.init(self.run)
        super().__init__(cfg, task, model, datasets, job_id)
        self._device = device
        if (template := getattr(model, "template", None)) is not None:  # the prompt format of conversations
            for dataset in (dataset for splits in datasets.values() for dataset in splits.values()):
                if hasattr(dataset, "set_template"):
                    dataset.set_template(template)

    def setup_output_dir(self) -> None:
        """Create the run's folder (LAVIS's name)."""
        self.folder = RunFolder(self.run, self.job_id)
        self.output_dir, self.result_dir = self.folder.path, self.folder.path / RESULTS
        with distributed.together():
            if distributed.is_main():
                try:
                    self.result_dir.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise ConfigError(f"run.output_dir: cannot write to {self.output_dir}: {error.strerror}") from error
        registry.mapping["paths"] |= {"output_dir": str(self.output_dir), "result_dir": str(self.result_dir)}

    # ---- parts, built on first use

    @cached_property
    def model(self) -> nn.Module:
        """The model on its device, without a DDP wrapper."""
        if any(other != self.frozen for other in distributed.gather_everywhere(self.frozen)):
            raise TrainingError("the processes have loaded different frozen weights: give all of them the same files")
        distributed.prepare(self._model, self.run, self.device)
        if self.run.feature_cache is not None:
            with distributed.gathered(self._model):
                data.fill_features(self._model, self.datasets, self.run, self.config.get_config().get("preprocess"))
        return self._model

    @cached_property
    def frozen(self) -> dict[str, str]:
        """Hashes of the frozen weights; computed before sharding."""
        return checkpoints.frozen_hashes(self._model, self.bridge)

    @cached_property
    def train_loader(self) -> MixtureLoader | LavisTrainLoader:
        """The training batches of this process."""
        return data.train_loader(self.datasets, self.run)

    @cached_property
    def train_step(self) -> TrainStep:
        """Takes the optimiser steps; has the optimiser and the fp16 loss scaler."""
        return TrainStep(self.model, self._loss, self.run, self.device)

    @property
    def steps(self) -> int:
        """Optimiser steps of the complete run."""
        return self.run.max_iters or self.train_loader.plan.steps_of(self.run.max_epoch or 0)

    @property
    def validation_interval(self) -> int | None:
        """Steps between two validations; None: only at the end."""
        if self.run.eval_every is None and self.run.max_epoch is not None:
            return self.train_loader.plan.steps_per_epoch()
        return self.run.eval_every

    # ---- training

    def train(self) -> None:
        """Train to the last step, then score ``test_splits``; with ``run.evaluate``, only score."""
        if self.evaluate_only:
            self.evaluate()
            return
        distributed.check_trainable(self._model)
        started = time.monotonic()
        try:
            with self.folder.claimed(), worker_deaths():
                self._resume()
                with distributed.together():
                    reporter = logs.Reporter(self.run, self.output_dir, self.steps, self.state)
                with reporter, noted_sigterm() as sigterm:
                    self._train_steps(sigterm, reporter)
                if self.state.best_step is None:
                    self._write_weights()
                else:
                    checkpoints.load_weights(self.model, load_file(self.output_dir / WEIGHTS))
                self.evaluate()
        except KeyboardInterrupt:  # saves nothing
            newest = checkpoints.newest(self.folder.checkpoints)
            hint = f"resume from {newest.name} with run.resume=auto" if newest else "there is no checkpoint"
            _log.info("interrupted after step %d; %s", self.state.step, hint)
            raise
        bad = sum(count.skipped for count in self.state.counts.values())
        if bad and distributed.is_main():
            _log.warning("%d samples could not be read (check-data --decode lists them)", bad)
        _log.info("training took %s", datetime.timedelta(seconds=int(time.monotonic() - started)))

    def _train_steps(self, sigterm: threading.Event, reporter: logs.Reporter) -> None:
        """The training loop: steps, validations and checkpoints, until the last step or a SIGTERM."""
        batches = self.train_loader.batches(self.state.step, self.steps)
        self.model.train()
        self._validate_if_due(reporter)  # if SIGTERM stopped the earlier run before it validated
        saved = time.monotonic()
        while self.state.step < self.steps:
            began = time.monotonic()
            micro_batches, fault = self._load(batches)
            waited = time.monotonic() - began
            rate = learning_rate(self.run, self.state.step, self.steps, self.validation_interval)
            save = began - saved >= 60 * (self.run.save_every_minutes or math.inf)
            stop = sigterm.is_set() or fault is not None  # reaches the other processes at the step's end
            result = self.train_step(self.state.step, rate, micro_batches, save, stop)
            if result.stop:
                with distributed.together():
                    if fault is not None:
                        raise fault
            dataset = micro_batches[0]["source"]
            self.state.record(dataset, result)
            self._check_progress(dataset, result)
            reporter.step(dataset, result, waited)
            if not result.stop:
                self._validate_if_due(reporter)
            step = self.state.step
            due = step in (self.steps, self.state.validated) or step % (self.run.save_every_steps or math.inf) == 0
            if result.stop or result.save or due:
                self._save_checkpoint(step)
                saved = time.monotonic()
            if result.stop:
                _log.info("stopped by SIGTERM after step %d; resume with run.resume=auto", step)
                raise SystemExit(128 + signal.SIGTERM)

    def _load(self, batches: Iterator[Samples]) -> tuple[list[Samples], ChatBridgeError | None]:
        """The micro-batches of a step; if the data raise an error, no batches and the error."""
        seed_all(self.run.seed, self.state.step, self.train_step.rank)  # for the random choices of LAVIS's data sets
        try:
            return list(itertools.islice(batches, self.run.accum_grad_iters)), None
        except ChatBridgeError as error:
            return [], error

    def _loss(self, model: nn.Module, samples: Samples) -> tuple[Tensor, Tensor]:
        """The mean loss of a micro-batch, and its number of target tokens (of samples, for LAVIS's tasks)."""
        samples = prepare_sample(dict(samples), cuda_enabled=self.cuda_enabled)
        if isinstance(self.task, ChatBridgeTask):
            return self.task.weighted_loss(model=model, samples=samples)
        loss = self.task.train_step(model=model, samples=samples)
        return loss, torch.tensor(float(max(1, len(sample_ids(samples)))), device=loss.device)

    def _check_progress(self, dataset: str, result: StepResult) -> None:
        """Raise, before a checkpoint is saved, if too many samples are unreadable or too many steps non-finite."""
        count, bad_steps = self.state.counts[dataset], self.state.nonfinite_steps
        tried = count.samples + count.skipped
        if fault := too_many_unreadable(dataset, count.skipped, tried, self.run.max_bad_share):
            raise DataError(fault)
        if result.outcome == "nonfinite":
            names = ", ".join(itertools.chain(*distributed.gather_everywhere(result.suspects)))
            _log.info("step %d was not finite and is skipped; its samples: %s", self.state.step, names)
        if bad_steps >= self.run.max_nonfinite_steps:
            raise TrainingError(
                f"{bad_steps} steps had a non-finite loss or gradient (run.max_nonfinite_steps "
                f"{self.run.max_nonfinite_steps}): lower run.init_lr, use precision bf16 or fp32, or check the samples "
                "in the log"
            )
        trained = any(counted.tokens for counted in self.state.counts.values()) and bad_steps < self.state.step
        if self.state.step == self.steps and not trained:
            raise TrainingError("nothing was trained: no step had a finite loss on a readable target token")

    # ---- evaluation

    def _validate_if_due(self, reporter: logs.Reporter) -> None:
        """Score ``valid_splits``; write ``model.safetensors`` if ``agg_metrics`` of the first one improves."""
        step = self.state.step
        due = step == self.steps or step % (self.validation_interval or math.inf) == 0
        if step in (0, self.state.validated) or not due or not self.run.valid_splits:
            return
        for split in self.run.valid_splits:
            stats = self.eval_epoch(split, step) or {}
            first = split == self.run.valid_splits[0]
            if first and "agg_metrics" in stats and self.state.improves(float(stats["agg_metrics"])):
                self._write_weights()
            reporter.write(split, {**stats, "best_step": self.state.best_step})
        self.state.validated = step
        self.model.train()

    def evaluate(self, cur_epoch: str | int = "best", skip_reload: bool = False) -> dict[str, Any]:
        """Score ``test_splits``: split -> its metrics.

        LAVIS's arguments choose the best weights, which the model has at the end of a training anyway.
        """
        found: dict[str, Any] = {}
        for split in self.run.test_splits:
            found[split] = self.eval_epoch(split, self.state.step)
            if distributed.is_main() and found[split] is not None:
                logs.write(self.output_dir / logs.LOG, split, found[split], self.state.step)
        return found

    @torch.no_grad()
    def eval_epoch(self, split_name: str, cur_epoch: str | int) -> Mapping[str, Any] | None:
        """Score one split; the metrics, or a `ChatBridgeError`, are the same on every process."""
        with distributed.together():
            loader = data.evaluation_loader(self.datasets, split_name, self.task, self.run, self.device)
        model = self.model.eval()
        self.task.before_evaluation(model=model, dataset=loader.dataset)
        with distributed.gathered(model), autocast(self.run.precision, self.device), distributed.together():
            results = self.task.evaluation(model, loader, cuda_enabled=self.cuda_enabled) if len(loader) else []
        data.check_readable(loader, self.run)
        with distributed.together():
            metrics = self.task.after_evaluation(val_result=results, split_name=split_name, epoch=cur_epoch)
        return distributed.from_main(metrics)

    # ---- checkpoints

    def _resume(self) -> None:
        """Load the checkpoint to resume from, if any; delete an earlier run's files if this run overwrites them."""
        model, plan, resumed = self.model, self.train_loader.plan, self.folder.resumed
        checkpoint = None
        with distributed.together():
            size, processes = sum(plan.sizes.values()), distributed.world_size()
            _log.info("training on %d samples of %s, %d x %s", size, ", ".join(plan.sizes), processes, self.device)
            if resumed is not None:
                checkpoint = checkpoints.read(resumed)
                position = checkpoint.state.plan.position_for(plan)
                steps = self.run.max_iters or plan.steps_of(self.run.max_epoch or 0, *position)
                checkpoints.check(checkpoint, model, self.bridge, self.frozen, plan, steps)
            if distributed.is_main():
                self.folder.clear()
                write_text(self.output_dir / CONFIG, OmegaConf.to_yaml(self.config.get_config(), resolve=True))
        if checkpoint is None:
            return
        saved = checkpoint.state
        if position != saved.plan.origin:
            _log.warning("batch sizes or processes differ from the checkpoint's: resuming at the next samples")
        plan.resume(*position)
        self.state = saved.progress
        checkpoints.load_weights(model, checkpoint.weights)
        checkpoints.load_optimizer(model, self.train_step.optimizer, checkpoint.optimizer)
        if saved.scaler and self.train_step.scaler.is_enabled():
            self.train_step.scaler.load_state_dict(saved.scaler)
        if checkpoints.step_of(self.output_dir / WEIGHTS) != self.state.best_step:  # of another run, or of a later step
            self.state.best_metric = self.state.best_step = None
        done, left = self.state.step, self.steps - self.state.step
        _log.info("resumed from %s after step %d; %d steps are left", resumed, done, left)

    def _save_checkpoint(self, cur_epoch: int, is_best: bool = False) -> None:
        """Write a checkpoint of the current step (LAVIS's method); all processes wait for it."""
        with distributed.together():
            if distributed.is_main():
                state = SavedState(
                    progress=self.state,
                    plan=SavedPlan.of(self.train_loader.plan, self.state.step),
                    scaler=self.train_step.scaler.state_dict(),
                    frozen=self.frozen,
                    adapters=lora.describe(self.model),
                )
                folder = self.folder.checkpoints / f"step_{self.state.step:08d}"
                tensors = checkpoints.optimizer_tensors(self.model, self.train_step.optimizer)
                checkpoints.save(Checkpoint(folder, self._weights(), tensors, state), self.run.keep_last)

    def _weights(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach() for name in self.bridge}

    def _write_weights(self) -> None:
        """Write ``model.safetensors`` in the run's folder."""
        path = self.output_dir / WEIGHTS
        with distributed.together():
            if distributed.is_main():
                checkpoints.write_weights(path, self._weights(), self.state.step, lora.describe(self.model))
        _log.info("the trained weights are in %s", path)


@contextmanager
def noted_sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, such as Slurm's at its time limit."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        _log.warning("training outside the main thread: SIGTERM does not save a checkpoint")
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
