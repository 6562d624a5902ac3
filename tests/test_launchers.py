"""What torchrun and Slurm say about a process, and what a user may say instead."""

from __future__ import annotations

import pytest

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.launchers import Place, announced, share_of

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}


def test_what_launchers_announce() -> None:
    assert announced({}) is None
    assert announced(TORCHRUN) == Place(3, 8, 1)
    assert announced(SLURM) == Place(9, 16, 1)
    assert announced({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None
    assert announced({"SLURM_JOB_ID": "5"}) is None
    with pytest.raises(ConfigError, match="are no numbers"):
        announced({"RANK": "first", "WORLD_SIZE": "2"})


def test_a_share_is_what_is_said_else_what_is_announced_else_all() -> None:
    assert share_of(1, 4, SLURM) == Place(1, 4)
    assert share_of(None, None, SLURM) == Place(9, 16, 1)
    assert share_of(None, None, {}) == Place(0, 1)


@pytest.mark.parametrize(
    ("rank", "world", "environment", "message"),
    [
        (1, None, {}, "--rank and --world belong together"),
        (None, 2, TORCHRUN, "--rank and --world belong together"),
        (2, 2, {}, "rank 2 is not one of 2 processes"),
        (-1, 2, {}, "rank -1 is not one of 2 processes"),
        (None, None, {"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 is not one of 2 processes"),
    ],
)
def test_shares_that_there_are_not(rank: int, world: int, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        share_of(rank, world, environment)
