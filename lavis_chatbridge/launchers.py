"""The rank of this process, from the environment variables of torchrun and srun, and its share of the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from lavis_chatbridge.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """One process among those that a launcher started.

    Attributes:
        rank: Its number among all processes, from 0.
        world_size: Number of processes.
        local_rank: Its number on its machine, from 0; also its CUDA device.
        launcher: The launcher and the variables that it set, for messages.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = ""


def announced(environment: Mapping[str, str]) -> Place:
    """This process as torchrun (RANK, ...) or srun (SLURM_PROCID, ...) announces it; one process without a launcher."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return Place(rank, world_size, int(environment.get("LOCAL_RANK", rank)), "torchrun (RANK, WORLD_SIZE)")
    tasks = int(environment.get("SLURM_NTASKS", 1))
    if tasks == 1 or "SLURM_PROCID" not in environment:
        return Place()
    if "SLURM_STEP_ID" not in environment and "SLURM_STEPID" not in environment:
        raise ConfigError(
            f"Slurm announces {tasks} processes (SLURM_NTASKS), but srun did not start this one: it would wait for "
            f"{tasks - 1} others that nobody starts. Write srun before the command, or unset SLURM_NTASKS to run alone"
        )
    rank, local_rank = int(environment["SLURM_PROCID"]), int(environment.get("SLURM_LOCALID", 0))
    return Place(rank, tasks, local_rank, "Slurm (SLURM_PROCID, SLURM_NTASKS)")


def share_of(rank: int | None, world: int | None, environment: Mapping[str, str]) -> Place:
    """This process by ``--rank`` and ``--world``, else as a launcher announces it."""
    if (rank is None) != (world is None):
        raise ConfigError("--rank and --world belong together: give both or none")
    place = announced(environment) if rank is None or world is None else Place(rank, world)
    if not 0 <= place.rank < place.world_size:
        raise ConfigError(f"rank {place.rank} is not one of {place.world_size} processes (counted from 0)")
    return place


def calm_threads(environment: MutableMapping[str, str]) -> None:
    """Make waiting compute threads sleep, and limit their number to the cores of this process.

    Spinning threads slow down every other process. OpenMP reads these variables once, before torch is imported. Values
    that the user has set stay.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(cores()))


def cores() -> int:
    """The number of cores that this process may use, by its CPU affinity and its control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return count if quota == "max" else min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups of version 2
        return count
