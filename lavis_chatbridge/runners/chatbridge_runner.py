"""The runner: LAVIS's `RunnerBase` with a training loop over steps that can stop and resume at any step.

It knows tasks, loaders and models by their contracts only: no modality, no prompt, no data set's name.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.runners.runner_base import RunnerBase
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_chatbridge.datasets.loader import worker_deaths
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError, TrainingError
from lavis_chatbridge.files import write_text
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners import checkpoints, data, distributed, features, optim, parallel
from lavis_chatbridge.runners.checkpoints import Checkpoint, SavedPlan, SavedScaler, SavedState
from lavis_chatbridge.runners.contracts import Datasets, Samples, Task, TokenTask, TrainLoader
from lavis_chatbridge.runners.folder import CONFIG, RESULTS, WEIGHTS, RunFolder
from lavis_chatbridge.runners.logs import LOG, LogFile, Reporter
from lavis_chatbridge.runners.settings import RunSettings, parse_run
from lavis_chatbridge.runners.signals import STOPPED_BY_SIGTERM, Watch
from lavis_chatbridge.runners.state import TrainState
from lavis_chatbridge.runners.step import StepResult, TrainStep, autocast, seed_all

_log = logging.getLogger(__name__)


@registry.register_runner("chatbridge_runner")
class ChatBridgeRunner(RunnerBase):
    """Trains and evaluates a model on a task, with the arguments of LAVIS's runners.

    Args:
        cfg: `runners.config.Config`, or LAVIS's own.
        task: Computes losses and predictions; LAVIS's own tasks can evaluate.
        model: The model.
        datasets: Data set name -> split -> data set.
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
        self.frozen: dict[str, str] = {}
        self._train_loader: TrainLoader | None = None
        self._wrapped_model: nn.Module | None
        self._optimizer: torch.optim.Optimizer | None
        self._scaler: torch.amp.GradScaler | None
        self.bridge = parallel.choose_trained(model, self.run.train)
        super().__init__(cfg, task, model, datasets, job_id)
        data.set_template(datasets, getattr(model, "template", None))

    # ---- parts, made when first used

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._place

    @property
    def model(self) -> nn.Module:
        """The model on its device, without a wrapper around it.

        Raises:
            TrainingError: If processes have loaded different frozen weights.
        """
        if self._wrapped_model is None:
            self.frozen = checkpoints.frozen_hashes(self._model, self.bridge)
            if any(other != self.frozen for other in distributed.gather_everywhere(self.frozen)):
                raise TrainingError(
                    "the processes have loaded different frozen weights: give all of them the same files"
                )
            parallel.prepare(self._model, self.run, self.device)
            self._wrapped_model = self._model
            with parallel.gathered(self._model):
                features.attach(self._model, self.datasets, self.run, self.config.get_config().get("preprocess"))
        return self._wrapped_model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters."""
        if self._optimizer is None:
            self._optimizer = optim.build_optimizer(self.model, self.run)
        return self._optimizer

    @property
    def scaler(self) -> torch.amp.GradScaler:
        """The fp16 loss scaler; disabled in other precisions."""
        if self._scaler is None:
            self._scaler = optim.build_scaler(self.run.precision, self.device)
        return self._scaler

    @property
    def train_loader(self) -> TrainLoader:
        """The training batches of this process."""
        if self._train_loader is None:
            self._train_loader = data.train_loader(self.datasets, self.run, self.device)
        return self._train_loader

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
            TrainingError: If training cannot continue; the newest checkpoint is intact.
            CheckpointError: If the checkpoint to resume from does not fit.
            ConfigError: If the model cannot be trained, a split is unknown, or the folder belongs to another run.
            DataError: If too many samples are unreadable.
        """
        if self.evaluate_only:
            self.evaluate()
            return
        self.run.check_splits(data.splits_of(self.datasets))
        parallel.check_trainable(self._model, self.device)
        started = time.monotonic()
        with self.folder.claimed(), worker_deaths(), Watch(self.run.save_every_minutes) as watch:
            self._start()
            with self._reporter() as reporter:
                if self._must_validate():
                    self._validate(reporter)
                watch.in_loop = True
                self._train_steps(watch, reporter)
                watch.in_loop = False
            self.state.check_end()
            self._write_final_weights()
            self.evaluate(skip_reload=True)
        _log.info("training took %s", datetime.timedelta(seconds=int(time.monotonic() - started)))

    def _start(self) -> None:
        """Load the checkpoint to resume from, if any, and delete the files of an earlier run that is overwritten."""
        model = self.model
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
            micro_batches, fault = self._next(batches)
            waited = time.perf_counter() - began
            skipped = sum(len(batch["skipped"]) for batch in micro_batches)
            readable = [batch for batch in micro_batches if batch.get("sample_id", True)]
            requests = watch.requests()
            requests.stop = requests.stop or fault is not None  # the other processes learn of a fault at the step's end
            result = step(self.state.step, readable, skipped, requests)
            if result.requests.stop:
                with distributed.together():
                    if fault is not None:
                        raise fault
            source = micro_batches[0]["source"]
            self.state.record(source, result)
            self._check_readable(source, micro_batches)
            reporter.step(source, result, waited)
            self._after_step(result, watch, reporter)

    def _next(self, batches: Iterator[dict[str, Any]]) -> tuple[list[dict[str, Any]], ChatBridgeError | None]:
        """The micro-batches of this process's next step, or the error that reading them raised."""
        try:
            return list(itertools.islice(batches, self.run.accum_grad_iters)), None
        except ChatBridgeError as error:
            return [], error

    def _check_readable(self, source: str, micro_batches: Iterable[Samples]) -> None:
        """Stop, before a checkpoint is saved, if too many samples of a source are unreadable."""
        if fault := self.state.unreadable(source, self.run):
            own = [cause for batch in micro_batches for _, cause in batch["skipped"]]
            causes = itertools.chain(*distributed.gather_everywhere(own))
            raise DataError("; ".join([fault, *(f"one of them: {cause}" for cause in itertools.islice(causes, 1))]))

    def _after_step(self, result: StepResult, watch: Watch, reporter: Reporter) -> None:
        """Save, stop and validate if due; saved first, a step survives a validation that fails."""
        if result.suspects:
            names = ", ".join(result.suspects)
            reporter.say(f"step {self.state.step} was not finite and is skipped; its samples: {names}")
        last, requests = self.state.step == self.steps, result.requests
        due = last or self._must_validate() or self._is_multiple_of(self.run.save_every_steps)
        if due or requests.save or requests.stop:
            self._save_checkpoint(self.state.step)
            watch.saved()
        self.state.check(self.run)
        if requests.stop and not last:
            reporter.say(f"stopped by SIGTERM after step {self.state.step}; resume with run.resume=auto")
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
        """Score ``test_splits``.

        Args:
            cur_epoch: ``"best"`` loads the best weights of this training, if validation chose some.
            skip_reload: Keep the model's weights.

        Returns:
            Split -> its metrics.
        """
        if self.evaluate_only and self.folder.resumed is not None:
            self._load_weights(self.folder.resumed / checkpoints.MODEL)
        elif not self.evaluate_only and not skip_reload and cur_epoch == "best":
            self._reload_best_model(self.model)
        logs: dict[str, Any] = {}
        for split in self.run.test_splits:
            logs[split] = self.eval_epoch(split, self.state.step, skip_reload=True)
            self.log_stats(logs[split], split)
        return logs

    @torch.no_grad()
    def eval_epoch(self, split_name: str, cur_epoch: str | int, skip_reload: bool = False) -> Mapping[str, Any] | None:
        """Score one split.

        Returns:
            The metrics, on every process.

        Raises:
            ChatBridgeError: On every process, if one of them fails.
        """
        if not skip_reload and cur_epoch == "best":
            self._reload_best_model(self.model)
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

    def log_stats(self, stats: Any, split_name: str) -> None:
        """Append a split's metrics to ``log.txt``."""
        if distributed.is_main() and isinstance(stats, Mapping):
            LogFile(self.output_dir / LOG).write(split_name, stats, self.state.step)

    def _reporter(self) -> Reporter:
        with distributed.together():
            return Reporter(
                self.run,
                self.output_dir,
                self.steps,
                self.state,
                not self._must_validate(),
                self.settings,
                distributed.is_main(),
            )

    # ---- checkpoints

    def _weights(self) -> dict[str, Tensor]:
        """The bridge, on the CPU."""
        return {name: self.model.get_parameter(name).detach().cpu().clone() for name in self.bridge}

    def _save_checkpoint(self, cur_epoch: int, is_best: bool = False) -> None:
        """Write the checkpoint of the current step, or only the best weights; all processes wait until it is on disk.

        Raises:
            TrainingError: On every process, if it cannot be written.
        """
        with distributed.together():
            if not distributed.is_main():
                return
            if is_best:
                self.folder.checkpoints.save_best(self._weights(), cur_epoch, lora.describe(self.model))
            else:
                self.folder.checkpoints.save(self._checkpoint())

    def _checkpoint(self) -> Checkpoint:
        scaler = self.scaler.state_dict()
        state = SavedState(
            progress=self.state,
            plan=SavedPlan.of(self.train_loader.plan, self.state.step),
            scaler=SavedScaler(scale=scaler["scale"], growth_tracker=scaler["_growth_tracker"]) if scaler else None,
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
        steps = self.run.max_iters or plan.steps_of(self.run.max_epoch or 0, position.step, position.positions)
        checkpoints.check_state(state, plan, steps, self.frozen, where)

    def _apply(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        """Continue at a checkpoint that `_check` has accepted."""
        state, plan = checkpoint.state, self.train_loader.plan
        position = state.plan.position_for(plan)
        if position != state.plan.origin:
            _log.warning(
                "batch sizes or processes differ from those of %s: resuming at the next samples", checkpoint.path
            )
        plan.resume(position.step, position.positions)
        self.state = state.progress
        checkpoints.load_weights(model, checkpoint.weights)
        checkpoints.load_optimizer(model, self.optimizer, checkpoint.optimizer)
        if state.scaler is not None and self.scaler.is_enabled():
            saved = {"scale": state.scaler.scale, "_growth_tracker": state.scaler.growth_tracker}
            self.scaler.load_state_dict(self.scaler.state_dict() | saved)
        left = self.steps - self.state.step
        _log.info("resumed from %s after step %d; %d steps are left", checkpoint.path, self.state.step, left)

    def _load_weights(self, path: Path) -> None:
        """Load a file of bridge weights, on every process."""
        with distributed.together():
            try:
                weights = load_file(path)
            except (OSError, SafetensorError) as error:
                raise TrainingError(f"cannot read {path}: {' '.join(str(error).split())}") from error
            checkpoints.check_weights(weights, self.model, self.bridge, path)
        _log.info("loading the weights of %s", path)
        checkpoints.load_weights(self.model, weights)

    def _best_weights(self) -> Path | None:
        """The file of the best weights, if validation chose some; it may be beside the checkpoint that was resumed."""
        step = self.state.best_step
        if step is None:
            return None
        folders = [self.folder.checkpoints]
        if self.folder.resumed is not None:
            folders.append(checkpoints.CheckpointFolder(self.folder.resumed.parent))
        found = next((path for folder in folders if (path := folder.best(step)) is not None), None)
        if found is None:
            _log.warning("the best weights, of step %d, have been deleted: using the last ones", step)
        return found

    def _reload_best_model(self, model: nn.Module) -> nn.Module:
        """Load the best weights of this run into the model, if validation chose some."""
        if (best := self._best_weights()) is not None:
            self._load_weights(best)
        return model

    def _write_final_weights(self) -> None:
        """Write ``model.safetensors`` in the run's folder: the best weights if validation chose some, else the last."""
        self._reload_best_model(self.model)
        target = self.output_dir / WEIGHTS
        with distributed.together():
            if distributed.is_main():
                try:
                    step = self.state.best_step if self._best_weights() else self.state.step
                    checkpoints.write_weights(target, self._weights(), step or 0, lora.describe(self.model))
                except (OSError, SafetensorError) as error:
                    raise TrainingError(f"cannot write {target}: {' '.join(str(error).split())}") from error
        _log.info("the trained weights are in %s", target)
