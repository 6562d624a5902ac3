"""The runner: LAVIS's `RunnerBase` with a training loop over steps that can stop and resume at any step.

It knows tasks, loaders and models by their contracts only: no modality, no prompt, no data set's name.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.runners.runner_base import RunnerBase
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_chatbridge.datasets.loader import MixtureLoader, too_many_unreadable, worker_deaths
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError, TrainingError
from lavis_chatbridge.files import write_text
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners import checkpoints, data, distributed, features, optim, parallel
from lavis_chatbridge.runners.checkpoints import Checkpoint, SavedPlan, SavedState, one_line
from lavis_chatbridge.runners.data import Datasets, LavisTrainLoader
from lavis_chatbridge.runners.folder import CONFIG, RESULTS, WEIGHTS, RunFolder
from lavis_chatbridge.runners.logs import LOG, LogFile, Reporter
from lavis_chatbridge.runners.settings import RunSettings, parse_run
from lavis_chatbridge.runners.signals import STOPPED_BY_SIGTERM, Watch
from lavis_chatbridge.runners.step import Samples, StepResult, TrainState, TrainStep, autocast, seed_all

_log = logging.getLogger(__name__)


class Task(Protocol):
    """LAVIS's contract of a task, as far as the runner calls it."""

    def train_step(self, model: nn.Module, samples: Samples) -> Tensor: ...
    def before_evaluation(self, model: nn.Module, dataset: Any) -> None: ...
    def evaluation(self, model: nn.Module, data_loader: Iterable[Samples], cuda_enabled: bool = True) -> list[Any]: ...
    def after_evaluation(self, val_result: list[Any], split_name: str, epoch: Any) -> Mapping[str, Any] | None: ...


@runtime_checkable
class TokenTask(Task, Protocol):
    """A task of this package: it returns a loss with its number of target tokens, and merges a split's data sets."""

    def weighted_loss(self, model: nn.Module, samples: Samples) -> tuple[Tensor, Tensor]: ...
    def evaluation_split(self, datasets: Mapping[str, Any]) -> Any: ...


@registry.register_runner("chatbridge_runner")
class ChatBridgeRunner(RunnerBase):
    """Trains and evaluates a model on a task, with the arguments of LAVIS's runners.

    Args:
        cfg: `runners.config.Config`, or LAVIS's own.
        task: Computes losses and predictions; LAVIS's own tasks can evaluate.
        model: The model.
        datasets: The data sets, as the task builds them.
        job_id: Name of the run's folder under ``run.output_dir``; ``run.job_id`` takes precedence.

    Raises:
        ConfigError: If the output folder cannot be written, or the run does not fit this machine.
    """

    def __init__(self, cfg: Any, task: Task, model: nn.Module, datasets: Datasets, job_id: str = "") -> None:
        plain: Any = OmegaConf.to_container(cfg.get_config(), resolve=True)
        self.settings: dict[str, Any] = plain
        self.run: RunSettings = getattr(cfg, "run", None) or parse_run(plain["run"])
        self._place = distributed.init(self.run)
        self.state = TrainState()
        self.bridge = parallel.choose_trained(model, self.run.train)
        super().__init__(cfg, task, model, datasets, job_id)
        data.set_template(datasets, getattr(model, "template", None))

    # ---- parts, made when first used

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._place

    @cached_property
    def model(self) -> nn.Module:
        """The model on its device, without a wrapper around it."""
        if any(other != self.frozen for other in distributed.gather_everywhere(self.frozen)):
            raise TrainingError("the processes have loaded different frozen weights: give all of them the same files")
        parallel.prepare(self._model, self.run, self.device)
        with parallel.gathered(self._model):
            features.attach(self._model, self.datasets, self.run, self.config.get_config().get("preprocess"))
        return self._model

    @cached_property
    def frozen(self) -> dict[str, str]:
        """Hashes of the frozen weights, computed before they are sharded."""
        return checkpoints.frozen_hashes(self._model, self.bridge)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters."""
        return optim.build_optimizer(self.model, self.run)

    @cached_property
    def scaler(self) -> torch.amp.GradScaler:
        """The fp16 loss scaler; disabled in other precisions."""
        return optim.build_scaler(self.run.precision, self.device)

    @cached_property
    def train_loader(self) -> MixtureLoader | LavisTrainLoader:
        """The training batches of this process."""
        return data.train_loader(self.datasets, self.run, self.device)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.run.max_iters is not None:
            return self.run.max_iters
        return self.train_loader.plan.steps_of(self.run.max_epoch or 0)

    @property
    def validation_interval(self) -> int | None:
        """Steps between two validations; None validates at the end only."""
        if self.run.eval_every is None and self.run.max_epoch is not None:
            return self.train_loader.plan.steps_per_epoch()
        return self.run.eval_every

    def setup_output_dir(self) -> None:
        """Create the run's folder (LAVIS's name)."""
        self.folder = getattr(self.config, "folder", None) or RunFolder(self.run, str(self.job_id or ""))
        self.folder.make()
        self.output_dir, self.result_dir = self.folder.path, self.folder.path / RESULTS
        registry.mapping["paths"] |= {"output_dir": str(self.output_dir), "result_dir": str(self.result_dir)}

    # ---- training

    def train(self) -> None:
        """Train to the last step, then score ``test_splits``; with ``run.evaluate`` only score.

        Raises:
            ChatBridgeError: If training cannot start or continue; the newest checkpoint is intact.
        """
        if self.evaluate_only:
            self.evaluate()
            return
        self.run.check_splits(data.splits_of(self.datasets))
        parallel.check_trainable(self._model, self.device)
        started = time.monotonic()
        with self.folder.claimed(), worker_deaths(), Watch(self.run.save_every_minutes) as watch:
            self._start()
            with distributed.together():
                validated = not self._must_validate()
                reporter = Reporter(self.run, self.output_dir, self.steps, self.state, validated, self.settings)
            with reporter:
                if self._must_validate():
                    self._validate(reporter)
                watch.in_loop = True
                self._train_steps(watch, reporter)
                watch.in_loop = False
            self.state.check_end()
            self._write_final_weights()
            self.evaluate()
        _log.info("training took %s", datetime.timedelta(seconds=int(time.monotonic() - started)))

    def _start(self) -> None:
        """Load the checkpoint to resume from, if any, and delete the files of an earlier run that is overwritten."""
        model = self.model  # exchanges hashes between processes, outside `together`
        with distributed.together():
            sizes = self.train_loader.plan.sizes
            _log.info("training on %d samples of %s", sum(sizes.values()), ", ".join(sizes))
            checkpoint = None
            if self.folder.resumed is not None:
                checkpoint = checkpoints.read(self.folder.resumed)
                self._check(checkpoint, model)
            if distributed.is_main():
                self.folder.clear()
                write_text(self.output_dir / CONFIG, OmegaConf.to_yaml(self.config.get_config(), resolve=True))
        if checkpoint is not None:
            self._apply(checkpoint, model)

    def _train_steps(self, watch: Watch, reporter: Reporter) -> None:
        """The training loop."""
        schedule = optim.schedule(self.run, self.steps, self.validation_interval)
        step = TrainStep(self.model, self._loss, self.optimizer, self.scaler, schedule, self.run, self.device)
        batches = self.train_loader.batches(self.state.step, self.steps)
        self.model.train()
        while self.state.step < self.steps:
            began = time.perf_counter()
            seed_all(self.run.seed, self.state.step, distributed.rank())  # LAVIS's data sets draw from them
            micro_batches: list[dict[str, Any]] = []
            fault: ChatBridgeError | None = None
            try:
                micro_batches = list(itertools.islice(batches, self.run.accum_grad_iters))
            except ChatBridgeError as error:
                fault = error
            waited = time.perf_counter() - began
            skipped = sum(len(batch["skipped"]) for batch in micro_batches)
            readable = [batch for batch in micro_batches if batch.get("sample_id", True)]
            stop = watch.stop or fault is not None  # the other processes learn of a fault at the step's end
            result = step(self.state.step, readable, skipped, watch.save(), stop)
            if result.stop:
                with distributed.together():
                    if fault is not None:
                        raise fault
            source = micro_batches[0]["source"]
            self.state.record(source, result)
            self._check_readable(source, micro_batches)
            reporter.step(source, result, waited)
            self._after_step(result, watch, reporter)

    def _check_readable(self, source: str, micro_batches: Iterable[Samples]) -> None:
        """Stop, before a checkpoint is saved, if too many samples of a source are unreadable."""
        count = self.state.sources[source]
        tried = count.samples + count.skipped
        if fault := too_many_unreadable(source, count.skipped, tried, self.run.max_bad_share):
            own = [cause for batch in micro_batches for _, cause in batch["skipped"]]
            causes = itertools.chain(*distributed.gather_everywhere(own))
            raise DataError("; ".join([fault, *(f"one of them: {cause}" for cause in itertools.islice(causes, 1))]))

    def _after_step(self, result: StepResult, watch: Watch, reporter: Reporter) -> None:
        """Save, stop and validate if due; saved first, a step survives a validation that fails."""
        if result.suspects:
            names = ", ".join(result.suspects)
            _log.info("step %d was not finite and is skipped; its samples: %s", self.state.step, names)
        last = self.state.step == self.steps
        due = last or self._must_validate() or self._is_multiple_of(self.run.save_every_steps)
        if due or result.save or result.stop:
            self._save_checkpoint(self.state.step)
            watch.saved()
        self.state.check(self.run)
        if result.stop and not last:
            _log.info("stopped by SIGTERM after step %d; resume with run.resume=auto", self.state.step)
            raise SystemExit(STOPPED_BY_SIGTERM)
        if self._must_validate():
            self._validate(reporter)

    def _must_validate(self) -> bool:
        """Whether the current step is to be validated and has not been."""
        done = self.state.step
        due = done > 0 and (done == self.steps or self._is_multiple_of(self.validation_interval))
        return bool(self.run.valid_splits) and due and self.state.validated != done

    def _is_multiple_of(self, interval: int | None) -> bool:
        return interval is not None and self.state.step % interval == 0

    def _loss(self, model: nn.Module, samples: Samples) -> tuple[Tensor, Tensor]:
        """The mean loss of a micro-batch, and its number of target tokens (of samples, for LAVIS's tasks)."""
        samples = prepare_sample(dict(samples), cuda_enabled=self.cuda_enabled)
        if isinstance(self.task, TokenTask):
            return self.task.weighted_loss(model=model, samples=samples)
        loss = self.task.train_step(model=model, samples=samples)
        sizes = (len(v) for k, v in samples.items() if k != "skipped" and isinstance(v, (list, Tensor)))
        return loss, torch.tensor(float(next(sizes, 1)), device=loss.device)

    # ---- evaluation

    def _validate(self, reporter: Reporter) -> None:
        """Score ``valid_splits``; keep the weights if the first one's ``agg_metrics`` is the best so far."""
        for number, split in enumerate(self.run.valid_splits):
            stats = self.eval_epoch(split, self.state.step) or {}
            if number == 0 and "agg_metrics" in stats and self.state.improves(float(stats["agg_metrics"])):
                self._save_checkpoint(self.state.step, is_best=True)
            reporter.write(split, {**stats, "best_step": self.state.best_step})
        self.state.validated = self.state.step
        with distributed.together():
            if distributed.is_main():
                self.folder.checkpoints.add_validation(self.state)
        self.model.train()

    def evaluate(self, cur_epoch: str | int = "best", skip_reload: bool = False) -> dict[str, Any]:
        """Score ``test_splits``: split -> its metrics.

        LAVIS's arguments choose the best weights, which the model has at the end of a training anyway.
        """
        if self.evaluate_only and self.folder.resumed is not None:
            self._load_weights(self.folder.resumed / checkpoints.MODEL)
        logs: dict[str, Any] = {}
        for split in self.run.test_splits:
            logs[split] = self.eval_epoch(split, self.state.step)
            if distributed.is_main() and isinstance(logs[split], Mapping):
                LogFile(self.output_dir / LOG).write(split, logs[split], self.state.step)
        return logs

    @torch.no_grad()
    def eval_epoch(self, split_name: str, cur_epoch: str | int) -> Mapping[str, Any] | None:
        """Score one split; the metrics, or a `ChatBridgeError`, are the same on every process."""
        with distributed.together():
            loader = self._evaluation_loader(split_name)
        model = self.model.eval()
        self.task.before_evaluation(model=model, dataset=getattr(loader, "dataset", None))
        with parallel.gathered(model), autocast(self.run.precision, self.device), distributed.together():
            results = self.task.evaluation(model, loader, cuda_enabled=self.cuda_enabled) if len(loader) else []
        data.check_readable(loader, self.run)
        with distributed.together():
            metrics = self.task.after_evaluation(val_result=results, split_name=split_name, epoch=cur_epoch)
        return distributed.from_main(metrics)

    def _evaluation_loader(self, split: str) -> Any:
        found = {name: splits[split] for name, splits in self.datasets.items() if split in splits}
        if not found:
            there = ", ".join(sorted(data.splits_of(self.datasets)))
            raise ConfigError(f"no data set has the split {split!r}; there are {there}")
        if isinstance(self.task, TokenTask) and all(hasattr(dataset, "sources") for dataset in found.values()):
            dataset = self.task.evaluation_split(found)
        elif len(found) == 1:
            dataset = next(iter(found.values()))
        else:
            raise ConfigError(
                f"the split {split!r} is in {', '.join(found)}; LAVIS's tasks score one data set at a time"
            )
        return data.evaluation_loader(dataset, self.run, self.device)

    # ---- checkpoints

    def _weights(self) -> dict[str, Tensor]:
        """The bridge, on the CPU."""
        return {name: self.model.get_parameter(name).detach().cpu().clone() for name in self.bridge}

    def _save_checkpoint(self, cur_epoch: int, is_best: bool = False) -> None:
        """Write the checkpoint of the current step, or only the best weights; all processes wait for it."""
        with distributed.together():
            if not distributed.is_main():
                return
            if is_best:
                best = self.folder.checkpoints.path / checkpoints.BEST
                checkpoints.write_weights(best, self._weights(), cur_epoch, lora.describe(self.model))
            else:
                self.folder.checkpoints.save(self._checkpoint())

    def _checkpoint(self) -> Checkpoint:
        """The run as it is now."""
        state = SavedState(
            progress=self.state,
            plan=SavedPlan.of(self.train_loader.plan, self.state.step),
            scaler=self.scaler.state_dict(),
            frozen=self.frozen,
            adapters=lora.describe(self.model),
            config=self.settings,
        )
        tensors = checkpoints.optimizer_tensors(self.model, self.optimizer)
        return Checkpoint(self.folder.checkpoints.path, self._weights(), tensors, state)

    def _check(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        """Refuse a checkpoint that does not fit this run; nothing has been changed before."""
        where, state, plan = checkpoint.path, checkpoint.state, self.train_loader.plan
        checkpoints.check_weights(checkpoint.weights, model, self.bridge, where, state.adapters)
        checkpoints.check_optimizer(checkpoint.optimizer, model, where)
        position = state.plan.position_for(plan)
        steps = self.run.max_iters or plan.steps_of(self.run.max_epoch or 0, *position)
        checkpoints.check_state(state, plan, steps, self.frozen, where)

    def _apply(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        """Continue at a checkpoint that `_check` has accepted."""
        state, plan = checkpoint.state, self.train_loader.plan
        position = state.plan.position_for(plan)
        if position != state.plan.origin:
            _log.warning(
                "batch sizes or processes differ from those of %s: resuming at the next samples", checkpoint.path
            )
        plan.resume(*position)
        self.state = state.progress
        checkpoints.load_weights(model, checkpoint.weights)
        checkpoints.load_optimizer(model, self.optimizer, checkpoint.optimizer)
        if state.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)
        left = self.steps - self.state.step
        _log.info("resumed from %s after step %d; %d steps are left", checkpoint.path, self.state.step, left)

    def _load_weights(self, path: Path) -> None:
        """Load a file of bridge weights, on every process."""
        with distributed.together():
            try:
                weights = load_file(path)
            except (OSError, SafetensorError) as error:
                raise TrainingError(f"cannot read {path}: {one_line(error)}") from error
            checkpoints.check_weights(weights, self.model, self.bridge, path)
        _log.info("loading the weights of %s", path)
        checkpoints.load_weights(self.model, weights)

    def _best_weights(self) -> Path | None:
        """The file of the best weights, if validation chose some; it may be beside the checkpoint that was resumed."""
        step = self.state.best_step
        if step is None:
            return None
        folders = [self.folder.checkpoints.path, *([self.folder.resumed.parent] if self.folder.resumed else [])]
        found = next((path for folder in folders if (path := checkpoints.best(folder, step)) is not None), None)
        if found is None:
            _log.warning("the best weights, of step %d, have been deleted: using the last ones", step)
        return found

    def _write_final_weights(self) -> None:
        """Write ``model.safetensors`` in the run's folder: the best weights if validation chose some, else the last."""
        best, step, target = self._best_weights(), self.state.step, self.output_dir / WEIGHTS
        if best is not None:
            self._load_weights(best)
            step = self.state.best_step or step
        with distributed.together():
            if distributed.is_main():
                checkpoints.write_weights(target, self._weights(), step, lora.describe(self.model))
        _log.info("the trained weights are in %s", target)
