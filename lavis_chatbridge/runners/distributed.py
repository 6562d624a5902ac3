"""Processes that train together: how they find one another, what each is, and the few things they tell each other.

One process without a launcher has no group, and every function here then answers for that one process. torchrun
announces itself by RANK, WORLD_SIZE and LOCAL_RANK; Slurm by SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID. CUDA
processes talk over NCCL, others over Gloo.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lavis_chatbridge.errors import ChatBridgeError, ConfigError, TrainingError
from lavis_chatbridge.launchers import Place, announced
from lavis_chatbridge.runners.settings import LONGEST_TIMEOUT, RunSettings

_log = logging.getLogger(__name__)
T = TypeVar("T")
_LOST = re.compile(r"timed? ?out|closed by peer|connection (reset|refused|was closed)|broken pipe", re.IGNORECASE)
_FIRST_PORT, _PORTS = 15000, 20000
_LEAVE_TAKING = datetime.timedelta(seconds=30)
_ROUNDS = itertools.count()
"""Numbers what processes write into their store, which under torchrun outlives a group: all count alike."""


class Meeting:
    """Where processes tell one another what is wrong before they join their group, in which all would wait for it.

    They need no backend, and so no device, for that: only the store that a group begins with.

    Args:
        run: The ``run`` section, as far as it could be read: where processes meet, and how long they wait.
    """

    def __init__(self, run: Mapping[str, Any] | None = None) -> None:
        values = run or {}
        minutes, url = values.get("timeout_minutes"), values.get("dist_url")
        self._wanted = values.get("distributed") is not False
        self._url = url if isinstance(url, str) else RunSettings.dist_url
        if not isinstance(minutes, (int, float)) or not 0 < minutes <= LONGEST_TIMEOUT:
            minutes = RunSettings.timeout_minutes
        self._timeout = datetime.timedelta(minutes=minutes)
        self._store: dist.Store | None = None
        self._device = ""

    @contextmanager
    def together(self) -> Iterator[None]:
        """What `together` does, for processes in a group and for those that have not joined one.

        Raises:
            ChatBridgeError: On a process without a fault of its own, the first one of another.
            ConfigError: If not all would compute on the same kind of device.
        """
        place = announced(os.environ)
        if dist.is_initialized():
            with together():
                yield
        elif place is None or place.world_size == 1 or not self._wanted:
            yield
        else:
            with _alike(lambda fault: self._tell(place, fault), Exception):
                yield

    def join(self, run: RunSettings) -> torch.device:
        """Join the group, see `init`; all processes have one kind of device, or none joins."""
        with self.together():
            device = device_of(run)
            self._device = device.type
        return init(run, self._store)

    def _tell(self, place: Place, fault: str | None) -> list[str | None]:
        """Every process's fault, in the order of ranks, on every process."""
        if fault is not None:
            _log.error("process %d: %s; telling the other processes", place.rank, fault)
        where = f"process {place.rank} of {place.world_size} cannot meet the others at {self._url}"
        with _reaching(where):
            if self._store is None:
                self._store = _store(self._url, place, self._timeout)
            store = dist.PrefixStore(f"chatbridge/{next(_ROUNDS)}", self._store)
            store.set(f"{place.rank}", json.dumps([fault, self._device]))
            said = [json.loads(word) for word in store.multi_get([f"{one}" for one in range(place.world_size)])]
            if store.add("read", 1) == place.world_size:
                store.set("all", "")
        faults = [one for one, _ in said]
        apart = "" if any(faults) else _apart([device for _, device in said])
        if place.rank == 0 and (apart or any(faults)):  # its end would take the store away from those that still read
            with suppress(RuntimeError):
                store.wait(["all"], _LEAVE_TAKING)
        if apart:
            raise ConfigError(apart)
        return faults


def init(run: RunSettings, store: dist.Store | None = None) -> torch.device:
    """Join the process group that a launcher announces, if one does, and choose this process's device.

    Fills in ``run.world_size``. May be called again; a group that stands is kept.

    Args:
        run: The run's settings.
        store: Where the processes have met before (`Meeting`); else they meet at ``run.dist_url``.

    Returns:
        The device of this process.

    Raises:
        ConfigError: If the run asks for what this machine or launcher does not have.
        TrainingError: If the other processes cannot be reached.
    """
    device, place = device_of(run), announced(os.environ)
    if place is not None and run.distributed and not dist.is_initialized():
        _join(run, place, device, store)
    run.world_size = world_size()
    setup_logging()
    _log.info("process %d of %d on %s, device %s", rank(), world_size(), socket.gethostname(), device)
    return device


def device_of(run: RunSettings) -> torch.device:
    """The device of this process, before it joins the others.

    Raises:
        ConfigError: If the run asks for what this machine or launcher does not have.
    """
    place = announced(os.environ)
    if place is not None and place.world_size > 1 and not run.distributed:
        raise ConfigError(f"run.distributed is false, but a launcher started {place.world_size} processes")
    return choose_device(run.device, place or Place())


def choose_device(wanted: str, place: Place) -> torch.device:
    """The device of a process.

    Raises:
        ConfigError: If CUDA is asked for where there is none, or a machine has more processes than devices.
    """
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError("run.device is cuda, but torch finds no CUDA device here: use run.device=cpu or auto")
    if place.local_rank >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"process {place.local_rank} of this machine has no CUDA device of its own: {found} found")
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def _join(run: RunSettings, place: Place, device: torch.device, store: dist.Store | None) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=run.timeout_minutes)
    with _reaching(f"process {place.rank} of {place.world_size} cannot join the others at {run.dist_url}"):
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"chatbridge/{next(_ROUNDS)}", store or _store(run.dist_url, place, timeout)),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )


def _store(url: str, place: Place, timeout: datetime.timedelta) -> dist.Store:
    """What all processes can read and write before they are a group; the process of rank 0, or torchrun, has it."""
    if url == "env://" and "MASTER_ADDR" not in os.environ:
        url = slurm_url(os.environ)
    store, _, _ = next(rendezvous(url, place.rank, place.world_size, timeout=timeout))
    store.set_timeout(timeout)
    return store


@contextmanager
def _reaching(what: str) -> Iterator[None]:
    """Say ``what`` did not work, and why, in one line.

    Raises:
        TrainingError: In place of the backend's own error.
    """
    try:
        yield
    except ChatBridgeError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise TrainingError(f"{what}: {str(error).splitlines()[0]}") from error


def _apart(devices: Sequence[str]) -> str:
    """Why processes cannot be one group: some would talk over NCCL, some over Gloo; an empty text if they can."""
    if len(set(devices)) < 2:
        return ""
    few, many = sorted(set(devices), key=devices.count)[:2]
    those = ", ".join(str(number) for number, device in enumerate(devices) if device == few)
    return (
        f"process {those} would compute on {few}, the others on {many}: look at the devices and drivers of those "
        "machines, or set run.device=cpu for all"
    )


def slurm_url(environment: Mapping[str, str]) -> str:
    """Where Slurm's tasks meet: the first host of the job, a port worked out from the job's number.

    Raises:
        ConfigError: If Slurm does not say which hosts the job has.
    """
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not hosts:
        raise ConfigError(
            "neither MASTER_ADDR nor SLURM_JOB_NODELIST is set: give run.dist_url, such as tcp://HOST:PORT"
        )
    job = int(re.sub(r"\D", "", environment.get("SLURM_JOB_ID", "")) or 0)
    return f"tcp://{first_host(hosts)}:{_FIRST_PORT + job % _PORTS}"


def first_host(node_list: str) -> str:
    """The first host of Slurm's short form: ``gpu[03-05,9],login1`` -> ``gpu03``."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", node_list)
    if found is None:
        raise ConfigError(
            f"cannot read Slurm's list of hosts {node_list!r}: give run.dist_url, such as tcp://HOST:PORT"
        )
    return "".join(part or "" for part in found.groups())


def close() -> None:
    """Leave the group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def in_group() -> bool:
    """Whether this process belongs to a group of more than one."""
    return world_size() > 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the files and the log."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if in_group():
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """``values`` added up over all processes, in place."""
    if in_group():
        dist.all_reduce(values)
    return values


def most_over_ranks(numbers: Sequence[int]) -> list[int]:
    """For each of some numbers the largest that any process has."""
    if not in_group():
        return list(numbers)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    values = torch.tensor(list(numbers), device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def from_main(value: T) -> T:
    """The main process's ``value`` on every process."""
    if not in_group():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_to_main(value: T) -> list[T]:
    """Every process's ``value``, in the order of ranks, on the main process; an empty list elsewhere."""
    if not in_group():
        return [value]
    box: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, box, dst=0)
    return box or []


def gather_everywhere(value: T) -> list[T]:
    """Every process's ``value``, in the order of ranks, on every process."""
    if not in_group():
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


@contextmanager
def together() -> Iterator[None]:
    """Give up on all processes where one of them must.

    Else the others wait for it, or take its next message for the one that they wait for. Within the block no process
    may wait for another one after what can fail.

    Raises:
        ChatBridgeError: On a process without a fault of its own, the first one of another.
    """
    with _alike(gather_everywhere, ChatBridgeError):
        yield


@contextmanager
def _alike(tell: Callable[[str | None], list[str | None]], kind: type[Exception]) -> Iterator[None]:
    """Give up where any process must.

    Args:
        tell: From this process's fault, or None, to those of all processes in the order of ranks.
        kind: What counts as a fault.
    """
    fault: Exception | None = None
    try:
        yield
    except kind as error:
        fault = error
    named = "" if isinstance(fault, ChatBridgeError) else f"{type(fault).__name__}: "
    try:
        everywhere = tell(None if fault is None else f"{named}{fault}")
    except (RuntimeError, ChatBridgeError):
        if fault is None:
            raise
        everywhere = []
    if fault is not None:
        raise fault
    for number, other in enumerate(everywhere):
        if other is not None:
            raise ChatBridgeError(f"process {number}: {other}")


@contextmanager
def contact() -> Iterator[None]:
    """Name the cause when another process does not answer any more, or the device has no memory left.

    Raises:
        TrainingError: In place of the backend's own error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"process {rank()} ran out of its device's memory: lower run.batch_size_train (or run.batch_tokens) "
            "and raise run.accum_grad_iters, or set run.gradient_checkpointing=true, and go on with run.resume=auto; "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    except RuntimeError as error:
        if not (in_group() and (isinstance(error, dist.DistError) or _LOST.search(str(error)))):
            raise
        raise TrainingError(
            f"process {rank()} has lost another one (it died, hangs, or took longer than run.timeout_minutes): look at "
            f"the first error among the processes' logs, then run again with run.resume=auto; "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def setup_logging() -> None:
    """Log to stderr: the main process everything from INFO, the others only warnings, with their rank."""
    where = f" rank {rank()}" if in_group() else ""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Stderr)]:
        root.removeHandler(handler)
    handler = _Stderr(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [%(levelname)s]{where} %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if is_main() else logging.WARNING)


class _Stderr(logging.StreamHandler):
    """The handler that `setup_logging` adds, to be told from those of others."""
