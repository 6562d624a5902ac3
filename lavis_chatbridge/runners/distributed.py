"""Processes that train together: how they find one another, what each is, and the few things they tell each other.

One process without a launcher has no group, and every function here then answers for that one process. torchrun
announces itself by RANK, WORLD_SIZE and LOCAL_RANK; Slurm by SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID. CUDA
processes talk over NCCL, others over Gloo.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lavis_chatbridge.errors import ChatBridgeError, ConfigError, TrainingError
from lavis_chatbridge.launchers import Place, announced
from lavis_chatbridge.runners.settings import RunSettings

_log = logging.getLogger(__name__)
T = TypeVar("T")
_LOST = re.compile(r"timed? ?out|closed by peer|connection (reset|refused|was closed)|broken pipe", re.IGNORECASE)
_FIRST_PORT, _PORTS = 15000, 20000


def init(run: RunSettings) -> torch.device:
    """Join the process group that a launcher announces, if one does, and choose this process's device.

    Fills in ``run.world_size``. May be called again; a group that stands is kept.

    Returns:
        The device of this process.

    Raises:
        ConfigError: If the run asks for what this machine or launcher does not have.
        TrainingError: If the other processes cannot be reached.
    """
    place = announced(os.environ)
    if place is not None and place.world_size > 1 and not run.distributed:
        raise ConfigError(f"run.distributed is false, but a launcher started {place.world_size} processes")
    device = choose_device(run.device, place or Place())
    if place is not None and run.distributed and not dist.is_initialized():
        _join(run, place, device)
    run.world_size = world_size()
    setup_logging()
    _log.info("process %d of %d on %s, device %s", rank(), world_size(), socket.gethostname(), device)
    return device


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


def _join(run: RunSettings, place: Place, device: torch.device) -> None:
    url = run.dist_url
    if url == "env://" and "MASTER_ADDR" not in os.environ:
        url = slurm_url(os.environ)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            init_method=url,
            rank=place.rank,
            world_size=place.world_size,
            timeout=datetime.timedelta(minutes=run.timeout_minutes),
            device_id=device if backend == "nccl" else None,
        )
    except (RuntimeError, ValueError, OSError) as error:
        cause = str(error).splitlines()[0]
        raise TrainingError(
            f"process {place.rank} of {place.world_size} cannot join the others at {url}: {cause}"
        ) from error


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
    fault: ChatBridgeError | None = None
    try:
        yield
    except ChatBridgeError as error:
        fault = error
    everywhere = gather_everywhere(None if fault is None else str(fault))
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
