"""The runner: LAVIS's `RunnerBase` with a training loop over steps that can stop and go on anywhere.

It knows tasks, loaders and models by their contracts only: no medium, no prompt, no data set's name.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.runners.runner_base import RunnerBase
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lavis_chatbridge.datasets.loader import worker_deaths
from lavis_chatbridge.errors import ChatBridgeError, CheckpointError, ConfigError, DataError, TrainingError
from lavis_chatbridge.files import atomic_file
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners import (
    checkpoints,
    data,
    distributed,
    features,
    migrations,
    optim,
    parallel,
    snapshot,
)
from lavis_chatbridge.runners.checkpoints import Checkpoint, CheckpointFolder
from lavis_chatbridge.runners.folder import WEIGHTS, RunFolder, identity
from lavis_chatbridge.runners.progress import LOG, Reporter, append_stats
from lavis_chatbridge.runners.settings import RunSettings, parse_run
from lavis_chatbridge.runners.signals import Watch, user_signal_outlived
from lavis_chatbridge.runners.state import TrainState
from lavis_chatbridge.runners.step import StepResult, TrainStep, autocast

_log = logging.getLogger(__name__)

STOPPED_BY_SIGTERM = 128 + 15
_DATA_OF_A_PLAN = ("sizes", "ratios", "seed")


@registry.register_runner("chatbridge_runner")
class ChatBridgeRunner(RunnerBase):
    """Trains and evaluates a model on a task; takes what LAVIS's runners take.

    Args:
        cfg: `runners.config.Config`, or LAVIS's own.
        task: Gives losses and predictions; LAVIS's own tasks can evaluate.
        model: What is trained.
        datasets: Data set name -> split -> data set.
        job_id: Name of the run's folder under ``run.output_dir``; ``run.job_id`` has precedence.

    Raises:
        ConfigError: If the output folder cannot be written, or the run does not fit this machine.
    """

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: Mapping[str, Any], job_id: str = "") -> None:
        self.run: RunSettings = getattr(cfg, "run", None) or _run_of(cfg)
        self.device_ = distributed.init(self.run)
        self.state = TrainState()
        self._train_loader: data.TrainLoader | None = None
        self._wrapped_model: nn.Module | None
        self._optimizer: torch.optim.Optimizer | None
        self._scaler: torch.amp.GradScaler | None
        self._lr_sched: optim.WarmupCosine | None
        self._marks: dict[str, str] = {}
        super().__init__(cfg, task, model, datasets, self.run.job_id if self.run.job_id is not None else job_id)

    # ---- the parts, made when first used

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.device_

    @property
    def model(self) -> nn.Module:
        """The model on its device, ready for the process group. There is no wrapper around it."""
        if self._wrapped_model is None:
            self._marks = parallel.prepare(self._model, self.run, self.device)
            self._wrapped_model = self._model
            with parallel.whole(self._model):
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
    def lr_scheduler(self) -> optim.WarmupCosine:
        """The learning rate per step."""
        if self._lr_sched is None:
            self._lr_sched = optim.schedule(self.optimizer, self.run, self.steps, self.validation_interval)
        return self._lr_sched

    @property
    def train_loader(self) -> data.TrainLoader:
        """The training batches of this process."""
        if self._train_loader is None:
            self._train_loader = data.train_loader(self.datasets, self.run, self.device)
        return self._train_loader

    @property
    def dataloaders(self) -> dict[str, Any]:
        """Split -> this process's batches of it (LAVIS's name)."""
        splits = {split for one in self.datasets.values() for split in one} - set(self.run.train_splits)
        return {split: self._evaluation_loader(split) for split in sorted(splits)} | {"train": self.train_loader}

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run; passes count what was taken before batches or processes were others."""
        if self.run.max_iters is not None:
            return self.run.max_iters
        return self.train_loader.plan.steps_of(self.run.max_epoch or 0)

    def setup_output_dir(self) -> None:
        """Make the run's folder: the one that was chosen before anything was loaded, else that of the configuration."""
        chosen: RunFolder | None = getattr(self.config, "folder", None)
        self.folder = chosen or RunFolder.choose(self.run, _plain(self.config), str(self.job_id or ""))
        self.continued, self.output_dir = self.folder.continued, self.folder.path
        self.result_dir = self.output_dir / "result"
        self.checkpoints = CheckpointFolder(self.folder.checkpoints, self.run.keep_last, self.run.keep_every)
        self.folder.make()
        registry.mapping["paths"] |= {"output_dir": str(self.output_dir), "result_dir": str(self.result_dir)}

    # ---- training

    def train(self) -> None:
        """Train to the last step, then score ``test_splits``; with ``run.evaluate`` only the latter.

        Raises:
            TrainingError: If training cannot go on; the last checkpoint is sound.
            CheckpointError: If the run to go on from does not fit.
            ConfigError: If the language model can only answer, a split is unknown, or another training has the
                folder or has left checkpoints in it.
            DataError: If nothing could be trained on.
        """
        if self.evaluate_only:
            self.evaluate()
            return
        data.check_splits(self.datasets, self.run)
        parallel.check_trainable(self._model, self.device)
        with self.folder.claimed(), user_signal_outlived(), distributed.contact():
            self._train()

    def _train(self) -> None:
        """Train in a folder that is this run's."""
        started = time.monotonic()
        model = self.model
        with distributed.together():
            sizes = self.train_loader.plan.sizes
            _log.info("training on %d samples of %s", sum(sizes.values()), ", ".join(sizes))
            if self.continued is not None:
                self._load_checkpoint(self.continued)
        self.folder.set_aside()
        optim.log_sizes(model)
        watched, reporting = Watch(self.run.save_every_minutes), self._reporter()
        with watched as watch, reporting as reporter, worker_deaths():
            if self._lacks_validation():
                self._validate(reporter)
            self._train_steps(watch, reporter)
        self.state.check_end()
        self._on_main(self._write_weights)
        self.evaluate()
        _log.info("training took %s", datetime.timedelta(seconds=int(time.monotonic() - started)))

    def _train_steps(self, watch: Watch, reporter: Reporter) -> None:
        """The training loop."""
        take = TrainStep(self.model, self._loss, self.optimizer, self.scaler, self.lr_scheduler, self.run, self.device)
        batches = self.train_loader.batches(self.state.step, self.steps)
        self.model.train()
        while self.state.step < self.steps:
            began = time.perf_counter()
            micro_batches, fault = self._next_of(batches)
            waited = time.perf_counter() - began
            skipped = sum(len(batch["skipped"]) for batch in micro_batches)
            readable = [batch for batch in micro_batches if batch.get("sample_id", True)]
            wishes = watch.wishes()
            wishes.stop = wishes.stop or fault is not None  # the others are in this step, and learn it by its end
            result = take(self.state.step, readable, skipped, wishes)
            if result.wishes.stop:
                with distributed.together():
                    if fault is not None:
                        raise fault
            source = micro_batches[0]["source"]
            self.state.record(source, result)
            self._check_readable(source, micro_batches)
            reporter.step(source, result, waited, self.state)
            self._after_step(result, watch, reporter)

    def _next_of(self, batches: Iterator[dict[str, Any]]) -> tuple[list[dict[str, Any]], ChatBridgeError | None]:
        """The micro-batches of this process's next step, or why there are none."""
        try:
            return list(itertools.islice(batches, self.run.accum_grad_iters)), None
        except ChatBridgeError as error:
            return [], error

    def _check_readable(self, source: str, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Stop, before anything is saved, where too much of what all processes tried of a source cannot be read."""
        if fault := self.state.unreadable(source, self.run):
            mine = [cause for batch in micro_batches for _, cause in batch["skipped"]]
            causes = itertools.chain(*distributed.gather_everywhere(mine))
            raise DataError("; ".join([fault, *(f"one of them: {cause}" for cause in itertools.islice(causes, 1))]))

    def _after_step(self, result: StepResult, watch: Watch, reporter: Reporter) -> None:
        """Save, stop and validate where it is time to; saved first, a step outlives a validation that fails."""
        if result.suspects:
            reporter.say(
                f"step {self.state.step} was not finite and is skipped; its samples: {', '.join(result.suspects)}"
            )
        last, wishes = self.state.step == self.steps, result.wishes
        due = last or self._lacks_validation() or self._is_multiple_of(self.run.save_every_steps)
        if due or wishes.save or wishes.stop:
            self._save_checkpoint(self.state.step)
            watch.saved()
        self.state.check(self.run)
        if wishes.stop and not last:
            reporter.say(f"stopped by SIGTERM after step {self.state.step}; run again with run.resume=auto to go on")
            raise SystemExit(STOPPED_BY_SIGTERM)
        if self._lacks_validation():
            self._validate(reporter)

    def _lacks_validation(self) -> bool:
        """Whether this step is to be validated and has not been."""
        done = self.state.step
        due = done > 0 and (done == self.steps or self._is_multiple_of(self.validation_interval))
        return bool(self.run.valid_splits) and due and self.state.validated != done

    def _is_multiple_of(self, interval: int | None) -> bool:
        return interval is not None and self.state.step % interval == 0

    @property
    def validation_interval(self) -> int | None:
        """Steps between two validations; None validates at the end only."""
        if self.run.eval_every is None and self.run.max_epoch is not None:
            return self.train_loader.plan.steps_per_epoch()
        return self.run.eval_every

    def _loss(self, model: nn.Module, samples: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The mean loss of a micro-batch, and of how many target tokens (of LAVIS's tasks: samples) it is the mean."""
        samples = prepare_sample(dict(samples), cuda_enabled=self.cuda_enabled)
        weighted = getattr(self.task, "weighted_loss", None)
        if weighted is not None:
            return weighted(model=model, samples=samples)
        loss = self.task.train_step(model=model, samples=samples)
        count = next(
            (len(value) for key, value in samples.items() if key != "skipped" and isinstance(value, (list, Tensor))), 1
        )
        return loss, torch.tensor(float(count), device=loss.device)

    # ---- evaluation

    def _validate(self, reporter: Reporter) -> None:
        """Score ``valid_splits``; keep the weights if the first one's ``agg_metrics`` is the best so far.

        The random generators are put back, since the checkpoint of this step has been saved before.
        """
        generators = snapshot.rng_state()
        for number, split in enumerate(self.run.valid_splits):
            stats = self.eval_epoch(split, self.state.step) or {}
            if number == 0 and "agg_metrics" in stats and self.state.improves(float(stats["agg_metrics"])):
                self._save_checkpoint(self.state.step, is_best=True)
            reporter.write(split, {**stats, "best_step": self.state.best_step}, self.state.step)
        self.state.validated = self.state.step
        self._on_main(lambda: self.checkpoints.add_validation(self.state.step, self.state.validation()))
        snapshot.set_rng_state(generators)
        self.model.train()

    def evaluate(self, cur_epoch: str | int = "best", skip_reload: bool = False) -> dict[str, Any]:
        """Score ``test_splits``.

        Args:
            cur_epoch: ``"best"`` takes the best weights of this run's training, where validation chose some.
            skip_reload: Take the weights as they are.

        Returns:
            Split -> its metrics.
        """
        if self.evaluate_only and self.continued is not None:
            path, model = self.continued, self.model
            weights = migrations.read(path, model).model if path.is_file() else checkpoints.read(path).model
            snapshot.load_trained_weights(model, weights, str(path))
        elif not self.evaluate_only and not skip_reload and cur_epoch == "best":
            self._reload_best_model(self.model)
        logs: dict[str, Any] = {}
        for split in self.run.test_splits:
            logs[split] = self.eval_epoch(split, self.state.step, skip_reload=True)
            self.log_stats(logs[split], split)
        return logs

    @torch.no_grad()
    def eval_epoch(self, split_name: str, cur_epoch: str | int, skip_reload: bool = False) -> dict[str, Any] | None:
        """Score one split.

        Returns:
            The metrics, on every process.

        Raises:
            ChatBridgeError: On every process, if one of them could not go on.
        """
        if not skip_reload and cur_epoch == "best":
            self._reload_best_model(self.model)
        with distributed.together():
            loader = self._evaluation_loader(split_name)
        model = self.model
        model.eval()
        self.task.before_evaluation(model=model, dataset=getattr(loader, "dataset", None))
        with parallel.whole(model), autocast(self.run.precision, self.device), distributed.together():
            results = self.task.evaluation(model, loader, cuda_enabled=self.cuda_enabled) if len(loader) else []
        data.check_readable(loader, self.run)
        with distributed.together():
            metrics = self.task.after_evaluation(val_result=results, split_name=split_name, epoch=cur_epoch)
        return distributed.from_main(metrics)

    def _evaluation_loader(self, split: str) -> Any:
        found = {name: splits[split] for name, splits in self.datasets.items() if split in splits}
        if not found:
            there = sorted({name for splits in self.datasets.values() for name in splits})
            raise ConfigError(f"no data set has the split {split!r}; there are {', '.join(there)}")
        together = getattr(self.task, "evaluation_split", None)
        if together is not None and all(hasattr(dataset, "sources") for dataset in found.values()):
            dataset = together(found)
        elif len(found) == 1:
            dataset = next(iter(found.values()))
        else:
            raise ConfigError(
                f"the split {split!r} is in {', '.join(found)}; LAVIS's tasks score one data set at a time"
            )
        return data.evaluation_loader(dataset, self.run, self.device)

    # ---- checkpoints

    def _save_checkpoint(self, cur_epoch: int, is_best: bool = False) -> None:
        """Write a checkpoint of step ``cur_epoch``; all processes wait until it is on disk.

        Raises:
            TrainingError: On every process, if it cannot be written.
        """
        rng = distributed.gather_to_main(snapshot.rng_state())
        loading = distributed.gather_to_main(self.train_loader.state_dict())
        save = self.checkpoints.save_best if is_best else self.checkpoints.save
        self._on_main(lambda: save(self._checkpoint(rng, loading, is_best), cur_epoch))

    def _on_main(self, write: Callable[[], object]) -> None:
        """Write something on the main process; all processes wait until it is on disk.

        Raises:
            TrainingError: On every process, if it cannot be written, or what it is made of not be read.
        """
        fault = ""
        if distributed.is_main():
            try:
                write()
            except ChatBridgeError as error:
                fault = str(error)
        if fault := distributed.from_main(fault):
            raise TrainingError(fault)

    def _checkpoint(self, rng: list[dict], loading: list[dict], only_weights: bool) -> Checkpoint:
        state = {
            "progress": self.state.to_dict(),
            "data": {"plan": self._plan_record(), "loaders": loading},
            "rng": rng,
            "scaler": self.scaler.state_dict(),
            "schedule": self.lr_scheduler.state_dict(),
            "identity": identity(self.run, _plain(self.config)),
            "fingerprints": self._marks,
            "adapters": lora.describe(self.model),
            "versions": snapshot.versions(),
            "config": _plain(self.config),
        }
        tensors = {} if only_weights else snapshot.optimizer_tensors(self.model, self.optimizer)
        return Checkpoint(snapshot.trained_weights(self.model), tensors, state)

    def _load_checkpoint(self, url_or_filename: str | os.PathLike) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: If it is damaged, or made for other weights, dimensions or sources.
        """
        path = Path(url_or_filename)
        if path.is_file():
            self._migrate(path)
            return
        checkpoint = checkpoints.read(path)
        adapters = checkpoint.state.get("adapters")
        with self._unless_it_fails(path):
            snapshot.check_trained_weights(self.model, checkpoint.model, str(path), adapters)
            snapshot.check_optimizer(self.model, checkpoint.optimizer, str(path))
            self._restore_state(checkpoint.state, path)
            snapshot.load_trained_weights(self.model, checkpoint.model, str(path), adapters)
        snapshot.load_optimizer(self.model, self.optimizer, checkpoint.optimizer)
        finished = ": there is nothing left to train" if self.state.step == self.steps else ""
        _log.info("going on from %s after step %d of %d%s", path, self.state.step, self.steps, finished)

    def _restore_state(self, state: Mapping[str, Any], path: Path) -> None:
        """Everything of a checkpoint but its tensors."""
        faults = checkpoints.differences(state["fingerprints"], self._marks)
        if faults:
            raise CheckpointError(f"{path} was trained with other frozen parts: {'; '.join(faults)}")
        if state["scaler"] or not self.scaler.is_enabled():  # a run in another precision had none
            self.scaler.load_state_dict(state["scaler"])
        self.state = TrainState.from_dict(state["progress"])
        self.state.take_validation(checkpoints.validation_of(path))
        self._restore_position(state, path)
        self._check_length(self.state.step, path)
        if distributed.rank() < len(state["rng"]):
            snapshot.set_rng_state(state["rng"][distributed.rank()])

    @contextmanager
    def _unless_it_fails(self, path: Path) -> Iterator[None]:
        """Put progress, position, scaler and random generators back as they are now if the block fails.

        Raises:
            CheckpointError: In the place of what a damaged state makes the block raise.
        """
        plan, loader = self.train_loader.plan, self.train_loader
        origin: Any = dict(plan.origin)
        before = (self.state, loader.state_dict(), self.scaler.state_dict(), snapshot.rng_state())
        try:
            yield
        except Exception as error:
            self.state, counts, scaler, rng = before
            plan.go_on_from(**origin)
            loader.load_state_dict(counts)
            self.scaler.load_state_dict(scaler)
            snapshot.set_rng_state(rng)
            if isinstance(error, ChatBridgeError):
                raise
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise CheckpointError(f"the state in {path} is not of the form that is written: {cause}") from error

    def _check_length(self, done: int, path: Path) -> None:
        """Refuse a checkpoint from beyond the end of this run."""
        if done > self.steps:
            raise CheckpointError(
                f"{path} is of step {done}, but this run ends at step {self.steps}: raise run.max_iters (or "
                "run.max_epoch), or set run.resume to a checkpoint of an earlier step"
            )

    def _migrate(self, path: Path) -> None:
        """Go on from another program's checkpoint: weights, optimiser where its order is known, and how far it was."""
        foreign = migrations.read(path, self.model)
        snapshot.check_trained_weights(self.model, foreign.model, str(path))
        snapshot.check_optimizer(self.model, foreign.optimizer, str(path))
        per_epoch = self.train_loader.plan.steps_per_epoch()
        done = foreign.steps if foreign.steps is not None else (foreign.epochs or 0) * per_epoch
        self._check_length(done, path)
        snapshot.load_trained_weights(self.model, foreign.model, str(path))
        snapshot.load_optimizer(self.model, self.optimizer, foreign.optimizer)
        self.state = TrainState(step=done)
        kept = "its optimiser" if foreign.optimizer else "a new optimiser: its own does not fit these parameters"
        _log.warning(
            "going on from %s, a checkpoint of format %r, at step %d with %s; the order of its data is not known",
            path,
            foreign.format,
            self.state.step,
            kept,
        )

    def _restore_position(self, state: Mapping[str, Any], path: Path) -> None:
        """Let the sources go on where the checkpoint left them, and take over the loaders' counts.

        Other batch sizes or another number of processes go on at the same sample; other data or seeds cannot.
        """
        plan, record = self.train_loader.plan, dict(state["data"]["plan"])
        origin, positions, left = record.pop("origin"), record.pop("positions"), record.pop("left", {})
        counts = [origin["step"], *origin["positions"].values(), *positions.values()]
        counts += itertools.chain(*left.values(), *origin.get("left", {}).values())
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"positions in the data are whole numbers, found {str(counts)[:100]}")
        mine = self._plan_record()
        found, expected = ({key: one[key] for key in _DATA_OF_A_PLAN} for one in (record, mine))
        faults = checkpoints.differences(found, expected)
        if faults:
            raise CheckpointError(f"{path} was trained on other data: {'; '.join(faults)}")
        if all(record[key] == mine[key] for key in record):
            plan.go_on_from(origin["step"], origin["positions"], origin.get("left"))
        else:
            _log.warning("batch sizes or processes are not those of %s: going on at the same samples", path)
            plan.go_on_from(self.state.step, positions, left)
        loading = state["data"]["loaders"]
        if distributed.rank() < len(loading):
            self.train_loader.load_state_dict(loading[distributed.rank()])

    def _best_weights(self) -> Path | None:
        """The best weights, where validation chose some; also those beside the checkpoint that the run goes on from."""
        step = self.state.best_step
        if step is None:
            return None
        found = self.checkpoints.best(step)
        if found is None and self.continued is not None:
            found = CheckpointFolder(self.continued.parent).best(step)
        if found is None:
            _log.warning("the best weights, of step %d, are not there any more: taking the last ones", step)
        return found

    def _reload_best_model(self, model: nn.Module) -> nn.Module:
        """Put the best weights of this run into the model, where validation chose some."""
        best = self._best_weights()
        if best is not None:
            _log.info("taking the best weights, %s", best)
            snapshot.load_trained_weights(model, checkpoints.read(best).model, str(best))
        return model

    def _write_weights(self) -> None:
        """The trained weights as one file, ``model.safetensors`` in the run's folder: the best ones, else the last."""
        best, target = self._best_weights(), self.output_dir / WEIGHTS
        weights = checkpoints.read(best).model if best is not None else snapshot.trained_weights(self.model)
        metadata = {"step": str(self.state.best_step if best else self.state.step)}
        metadata |= checkpoints.adapters_metadata(lora.describe(self.model))
        try:
            with atomic_file(target) as partial:
                save_file(weights, partial, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"cannot write {target}: {checkpoints.cause(error)}") from error
        _log.info("the trained weights are in %s", target)

    def _plan_record(self) -> dict[str, Any]:
        plan = self.train_loader.plan
        return {
            "sizes": plan.sizes,
            "ratios": plan.ratios,
            "batch_sizes": plan.batch_sizes,
            "world_size": plan.world_size,
            "seed": plan.seed,
            "origin": plan.origin,
            "positions": plan.positions(self.state.step),
            "grouped": bool(plan.lengths),
            "left": plan.left(self.state.step),
        }

    # ---- logs

    def _reporter(self) -> Reporter:
        config = _plain(self.config)
        main, validated = distributed.is_main(), not self._lacks_validation()
        with distributed.together():
            return Reporter(self.run, self.output_dir, self.steps, self.state.step, config, main, validated)

    def log_stats(self, stats: Any, split_name: str) -> None:
        """Append a split's metrics to ``log.txt``."""
        if distributed.is_main() and isinstance(stats, Mapping):
            append_stats(self.output_dir / LOG, split_name, stats, self.state.step)


def _run_of(cfg: Any) -> RunSettings:
    """The typed ``run`` section of a configuration that LAVIS's own ``Config`` read."""
    return parse_run(OmegaConf.to_container(cfg.run_cfg, resolve=True))  # type: ignore[arg-type]


def _plain(cfg: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries."""
    return OmegaConf.to_container(cfg.get_config(), resolve=True)  # type: ignore[return-value]
