"""How processes find one another: torchrun, Slurm, neither."""

from __future__ import annotations

import pytest
import torch

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.runners import distributed
from lavis_chatbridge.runners.distributed import Place
from tests.runners.runner_parts import config


def test_without_a_launcher_there_is_no_group(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    run = config(tmp_path).run
    assert distributed.init(run) == torch.device("cpu")
    assert (run.world_size, distributed.rank(), distributed.in_group()) == (1, 0, False)
    assert distributed.gather_to_main(3) == distributed.gather_everywhere(3) == [3]
    assert distributed.from_main("x") == "x"
    distributed.barrier()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[9,11]", "gpu9"),
        ("a-b-[001-128]-x", "a-b-001-x"),
        ("n1,n2", "n1"),
    ],
)
def test_the_first_host_of_a_slurm_job(nodes, first):
    assert distributed.first_host(nodes) == first


def test_slurm_tasks_agree_on_where_to_meet():
    one = distributed.slurm_url({"SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_JOB_ID": "123456"})
    assert one == f"tcp://gpu1:{15000 + 123456 % 20000}"
    with pytest.raises(ConfigError, match="neither MASTER_ADDR nor SLURM_JOB_NODELIST"):
        distributed.slurm_url({})


def test_a_device_that_is_not_there():
    assert distributed.choose_device("auto", Place()) == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        distributed.choose_device("cuda", Place())


def test_processes_that_are_not_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a launcher started 2 processes"):
        distributed.init(config(tmp_path, distributed=False).run)
