"""The rank of a process, from torchrun, srun or the user; its threads."""

from __future__ import annotations

import pytest

from lavis_chatbridge import launchers
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.launchers import set_thread_defaults, share_of

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SBATCH = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}
SRUN = {**SBATCH, "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("rank", "world", "environment", "expected"),
    [
        (None, None, {}, (0, 1, 0)),
        (None, None, TORCHRUN, (3, 8, 1)),
        (None, None, SRUN, (9, 16, 1)),
        (None, None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1, 0)),
        (None, None, {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4"}, (0, 1, 0)),
        (1, 4, SBATCH, (1, 4, 0)),
        (1, None, {}, "--rank and --world belong together"),
        (2, 2, {}, "rank 2 is not one of 2 processes"),
        (None, None, {"RANK": "first", "WORLD_SIZE": "2"}, "RANK is 'first', expected a whole number"),
        (None, None, SBATCH, r"Slurm announces 16 processes \(SLURM_NTASKS\), but srun did not start"),
    ],
)
def test_the_rank_is_the_users_or_the_launchers(rank, world, environment, expected) -> None:
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            share_of(rank, world, environment)
    else:
        found = share_of(rank, world, environment)
        assert (found.rank, found.world_size, found.local_rank) == expected


def test_threads_wait_asleep_and_fit_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    environment: dict[str, str] = {}
    set_thread_defaults(environment)
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert int(environment["OMP_NUM_THREADS"]) <= 3
    monkeypatch.setattr(launchers.Path, "read_text", lambda path: "150000 100000\n")
    assert launchers.cores() == 2
    own = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}
    set_thread_defaults(own)
    assert own == {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}
