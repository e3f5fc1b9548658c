"""Process groups: started on demand, refused with the command that would work, seeded by place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megabridge.parallel.topology import Topology
from tests.support.command import python
from tests.support.rank_server import RankServer

ROOT = Path(__file__).parents[2]


def test_starting_twice_is_refused(ranks: RankServer) -> None:
    [message, _] = ranks.run("tests.support.ranks:start_again", topology=Topology(tp=2))
    assert message == "groups of tp2 exist already; call process_groups.stop() before process_groups.start()."


def test_ensure(ranks: RankServer) -> None:
    for messages in ranks.run("tests.support.ranks:ensure", topology=Topology(tp=2, pp=2)):
        assert messages == [
            "the process groups of this process are tp2pp2, but the model needs tp4; "
            "call process_groups.stop() first or use the same sizes.",
            "the process groups of this process are tp2pp2, but the model needs pp2; "
            "call process_groups.stop() first or use the same sizes.",
            "tp2pp2vpp2",
            "2",
            "None",
        ]


def test_layouts_one_after_the_other(ranks: RankServer) -> None:
    for seen in ranks.run("tests.support.ranks:changes", topology=Topology(dp=4)):
        assert [(name, total) for name, total, _ in seen[:4]] == [("tp4", 4), ("pp2vpp2dp2", 1), ("tp2pp2", 2), ("dp4", 1)]
        assert seen[-1][2] <= seen[4][2], "each layout closes its predecessor's connections"
    [message, _] = ranks.run("tests.support.ranks:wrong_change", topology=Topology(tp=2))
    assert message.startswith("tp2: tp8 needs 8 processes, but 2 processes run")


def test_seeds(ranks: RankServer) -> None:
    """Rank order: tp fastest, then dp, then pp."""
    draws = ranks.run("tests.support.ranks:draws", topology=Topology(tp=2, dp=2, pp=2))
    assert all(first == again for first, _, _, again in draws), "a seed makes the numbers"
    shared = [(first, other) for first, other, _, _ in draws]
    assert len(set(shared[:4])) == len(set(shared[4:])) == 1, "a stage shares its default generator"
    assert shared[0] != shared[4], "stages differ"
    own = [draw[2] for draw in draws]
    assert own[0] == own[2] and own[1] == own[3], "replicas are equal"
    assert len(set(own)) == 4, "tensor-parallel ranks differ"


def test_one_process_needs_no_set_up_and_more_are_named() -> None:
    code = """
from megabridge.parallel import process_groups as groups
from megabridge.parallel.topology import Topology
from megabridge.errors import ConfigError
try:
    groups.ensure(Topology(tp=2, pp=2))
except ConfigError as error:
    print(error)
print(groups.current())
groups.ensure(Topology())
print(groups.current(), groups.world_size())
groups.stop()
groups.stop()
print(groups.current())
"""
    done = python(code)
    assert done.stdout.splitlines() == [
        "tp2pp2 needs 4 processes, but 1 process runs; start it with `torchrun --nproc-per-node=4 <script>`, "
        "or change the sizes in parallel.",
        "None",
        "single 1",
        "None",
    ], done.stderr


def test_under_torchrun_the_environment_is_used(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from megabridge.parallel import process_groups as groups\n"
        "from megabridge.parallel.topology import Topology\n"
        "groups.ensure(Topology(tp=2))\n"
        "import torch.distributed as dist\n"
        "dist.barrier()\n"
        "print(f'rank {dist.get_rank()} of {groups.world_size()}\\n', end='', flush=True)\n"
        "groups.stop()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        cwd=ROOT,
        env={**os.environ, "MEGABRIDGE_PLATFORM": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert sorted(done.stdout.split("\n")) == ["", "rank 0 of 2", "rank 1 of 2"], done.stderr


def test_every_group_waits_as_long_as_it_was_told() -> None:
    """Also megatron-core's, which wait half an hour otherwise; and those of the layout that comes after.

    megatron-core 0.18 hands its timeout to all but one group, over which no training or save of ours communicates.
    """
    code = """
import torch
from megatron.core import parallel_state
from megabridge.parallel import process_groups as groups
from megabridge.parallel.topology import Topology

def waits():
    known = [group for group in parallel_state._global_process_group_list if group is not None]
    known = [group for group in known if group.group_desc != "EXPERT_DATA_PARALLEL_GROUP_GLOO"]
    return len(known) > 5, {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in known}

groups.start(Topology(), timeout=7.0)
print(waits())
groups.change(Topology())
print(waits())
"""
    done = python(code)
    assert done.stdout.splitlines() == ["(True, {7.0})"] * 2, done.stdout + done.stderr
