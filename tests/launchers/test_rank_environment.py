"""Places among ranks that torchrun and srun start."""

from __future__ import annotations

import pytest

from megabridge.errors import ConfigError
from megabridge.launchers.rank_environment import RankEnvironment, expand_counts, find, first_host

SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_STEP_NODELIST": "gpu-[07-08],big1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


def test_torchrun() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    place = find(environ)
    assert place == RankEnvironment(3, 4, 1, 2, "a", 7) and place.environ() == environ


def test_srun() -> None:
    place = find(SLURM)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (9, 12, 1, 4)
    assert place.master_addr == "gpu-07" and 20000 <= place.master_port < 32000
    other = find(SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert other is not None and other.master_port == place.master_port and other.local_world_size == 8
    assert find(SLURM | {"SLURM_STEP_ID": "1"}) != place


def test_none_where_nobody_else_takes_part() -> None:
    assert find({}) is None
    assert find({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}) is None, "a batch script"
    assert find({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None, "an interactive shell"


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "many"},
    ],
)
def test_half_an_environment_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        find(environ)


def test_node_lists_and_counts() -> None:
    lists = {"a": "a", "a,b": "a", "n[3-5]": "n3", "n[003,7]": "n003", "r[1-2]c[04-06],x": "r1c04"}
    assert {text: first_host(text) for text in lists} == lists
    assert expand_counts("8(x2),4") == [8, 8, 4]
