"""What torchrun and Slurm say about a process in its environment: training, shards and annotations share work by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lavis_chatbridge.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that a launcher announced.

    Attributes:
        rank: Its number among all processes, from 0.
        world_size: How many processes there are.
        local_rank: Its number on its machine, from 0; also its CUDA device.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def announced(environment: Mapping[str, str]) -> Place | None:
    """This process's place by torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK) or Slurm's (SLURM_PROCID, ...).

    Returns:
        None where neither started it.

    Raises:
        ConfigError: If the variables are no numbers.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            rank, local = int(environment["RANK"]), int(environment.get("LOCAL_RANK", environment["RANK"]))
            return Place(rank, int(environment["WORLD_SIZE"]), local)
        if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
            local = int(environment.get("SLURM_LOCALID", "0"))
            return Place(int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]), local)
    except ValueError as error:
        raise ConfigError(f"the launcher's environment variables are no numbers: {error}") from error
    return None


def share_of(rank: int | None, world: int | None, environment: Mapping[str, str]) -> Place:
    """This process's place as ``--rank`` and ``--world`` say, else as a launcher does, else alone.

    Raises:
        ConfigError: If one of the two is missing, or the rank is none of the processes.
    """
    if (rank is None) != (world is None):
        raise ConfigError("--rank and --world belong together: give both or none")
    place = announced(environment) or Place() if rank is None or world is None else Place(rank, world)
    if not 0 <= place.rank < place.world_size:
        raise ConfigError(f"rank {place.rank} is not one of {place.world_size} processes (counted from 0)")
    return place
