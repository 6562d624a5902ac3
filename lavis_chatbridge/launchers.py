"""The rank of this process, from the environment variables of torchrun and srun, and its number of CPU threads."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from lavis_chatbridge.errors import ConfigError


@dataclass(frozen=True)
class ProcessRank:
    """A process among those of its launcher, whose name is for messages; ``local_rank`` is also its CUDA device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} is not one of {self.world_size} processes (counted from 0)")


def current_rank(environment: Mapping[str, str]) -> ProcessRank:
    """This process, from torchrun's (RANK, ...) or srun's variables (SLURM_PROCID, ...); without them, rank 0 of 1.

    Raises:
        ConfigError: If a variable is not a whole number, or srun did not start the processes that Slurm announces.
    """

    def number(name: str, default: int = 0) -> int:
        text = environment.get(name, str(default))
        if not text.isdecimal():
            raise ConfigError(f"the environment variable {name} is {text!r}, expected a whole number: set or unset it")
        return int(text)

    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank = number("RANK")
        return ProcessRank(rank, number("WORLD_SIZE"), number("LOCAL_RANK", rank), "torchrun (RANK, WORLD_SIZE)")
    tasks = number("SLURM_NTASKS", 1)
    if tasks == 1 or "SLURM_PROCID" not in environment:
        return ProcessRank()
    if "SLURM_STEP_ID" not in environment and "SLURM_STEPID" not in environment:
        raise ConfigError(
            f"Slurm announces {tasks} processes (SLURM_NTASKS), but srun did not start this one: it would wait for "
            f"{tasks - 1} others that nobody starts. Write srun before the command, or unset SLURM_NTASKS to run alone"
        )
    rank, local_rank = number("SLURM_PROCID"), number("SLURM_LOCALID")
    return ProcessRank(rank, tasks, local_rank, "Slurm (SLURM_PROCID, SLURM_NTASKS)")


def share_of(rank: int | None, world: int | None, environment: Mapping[str, str]) -> ProcessRank:
    """This process, from ``--rank`` and ``--world``, else from a launcher's variables."""
    if (rank is None) != (world is None):
        raise ConfigError("--rank and --world belong together: give both or none")
    return current_rank(environment) if rank is None or world is None else ProcessRank(rank, world)


def set_thread_defaults(environment: MutableMapping[str, str]) -> None:
    """Limit compute threads to this process's cores, and let idle ones sleep instead of spin.

    Spinning threads slow down all other processes. Call this before torch is imported: OpenMP reads the variables only
    once. Values that the user has set are kept.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(cores()))


def cores() -> int:
    """The number of cores that this process may use: its CPU affinity, limited by its cgroup's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return count if quota == "max" else min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups of version 2
        return count
