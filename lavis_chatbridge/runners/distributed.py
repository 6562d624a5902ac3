"""Distributed training: the process group, each process's device, and the exchange of small objects.

Without a launcher there is one process and no group; all functions also work then.
"""

from __future__ import annotations

import datetime
import functools
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lavis_chatbridge.errors import ChatBridgeError, ConfigError, TrainingError
from lavis_chatbridge.launchers import ProcessRank, current_rank
from lavis_chatbridge.runners.settings import RunSettings

_log = logging.getLogger(__name__)
T = TypeVar("T")


def init(run: RunSettings) -> torch.device:
    """Join the process group if a launcher started several processes; returns this process's device."""
    place = current_rank(os.environ) if run.distributed else ProcessRank()
    device = choose_device(run.device, place)
    if place.world_size > 1 and not dist.is_initialized():
        _join(run, place, device)
    where = f" rank {rank()}" if in_group() else ""
    logging.basicConfig(format=f"%(asctime)s [%(levelname)s]{where} %(message)s")
    logging.getLogger().setLevel(logging.INFO if is_main() else logging.WARNING)
    _log_place(rank(), world_size(), device)
    return device


@functools.cache
def _log_place(rank: int, world_size: int, device: torch.device) -> None:
    """Once per process: a command and its runner both call `init`."""
    _log.info("process %d of %d on %s, device %s", rank, world_size, socket.gethostname(), device)


def choose_device(wanted: str, place: ProcessRank) -> torch.device:
    """The device of a process; with several GPUs, the one with its local rank."""
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError("run.device is cuda, but torch finds no CUDA device here: use run.device=cpu or auto")
    if place.local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError(f"local rank {place.local_rank} has no CUDA device of its own: {count} found on this machine")
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def _join(run: RunSettings, place: ProcessRank, device: torch.device) -> None:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise ConfigError(
            "MASTER_ADDR or MASTER_PORT is not set: before srun, put export MASTER_ADDR=$(scontrol show hostnames "
            "$SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500"
        )
    print(
        f"rank {place.rank} of {place.world_size}, announced by {place.launcher}, waits for the others at "
        f"{address}:{port} for up to {run.timeout_minutes:g} minutes",
        file=sys.stderr,
        flush=True,
    )
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=place.rank,
            world_size=place.world_size,
            timeout=datetime.timedelta(minutes=run.timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError, OSError) as error:
        cause = str(error).splitlines()[0]
        raise TrainingError(f"rank {place.rank} of {place.world_size} cannot join the others: {cause}") from error


def close() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def in_group() -> bool:
    """Whether this process is one of several."""
    return world_size() > 1


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes files and logs."""
    return rank() == 0


def from_main(value: T) -> T:
    """The ``value`` of rank 0, on every process."""
    box: list[Any] = [value]
    if in_group():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_everywhere(value: T) -> list[T]:
    """The ``value`` of every process, in rank order, on every process."""
    box: list[Any] = [value] * world_size()
    if in_group():
        dist.all_gather_object(box, value)
    return box


@contextmanager
def together() -> Iterator[None]:
    """Re-raise a `ChatBridgeError` of any rank on every rank, at the end of the block.

    The block must not communicate between processes after a line that can raise.
    """
    try:
        yield
    except ChatBridgeError as error:
        gather_everywhere(str(error))
        raise
    for number, other in enumerate(gather_everywhere("")):
        if other:
            raise ChatBridgeError(f"process {number}: {other}")
