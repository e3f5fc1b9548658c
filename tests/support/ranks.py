"""What the ranks of tests/parallel and tests/launchers run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megabridge.errors import ConfigError, message
from megabridge.parallel import collectives, process_groups
from megabridge.parallel.topology import Topology

from megatron.core import parallel_state, tensor_parallel


def total(start: int) -> tuple[int, int, int]:
    """This rank's tensor-parallel and pipeline rank, and the sum over all ranks of rank + start."""
    value = torch.tensor(dist.get_rank() + start, device="cuda")
    dist.all_reduce(value)
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        int(value),
    )


def fail(rank: int, how: str, folder: str) -> None:
    """Rank `rank` fails; the others wait in a collective, each having started a process of its own."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(folder, f"{dist.get_rank()}.pid").write_text(f"{os.getpid()} {child.pid}")
    dist.barrier()
    if dist.get_rank() == rank:
        if how == "error":
            raise ConfigError("the answer must be 42; it is 41.")
        if how == "bug":
            raise KeyError("lost")
        if how == "killed":
            os.kill(os.getpid(), 9)
        if how == "exit":
            os._exit(7)
    if how == "hang":
        time.sleep(300)
    dist.all_reduce(torch.ones(1))


def start_again() -> str:
    """The message of starting groups twice."""
    try:
        process_groups.start(Topology())
    except ConfigError as error:
        return str(error)
    return ""


def long_error() -> None:
    raise ValueError("ö" * 100_000)


def ensure() -> list[str]:
    """The messages of groups.ensure for topologies that this process can't have, and how vpp changes."""
    messages = []
    for topology in (Topology(tp=4), Topology(pp=2)):
        try:
            process_groups.ensure(topology)
        except ConfigError as error:
            messages.append(str(error))
    process_groups.ensure(Topology(tp=2, pp=2, vpp=2))
    messages.append(str(process_groups.current()))
    messages.append(str(parallel_state.get_virtual_pipeline_model_parallel_world_size()))
    process_groups.ensure(Topology(tp=2, pp=2, etp=2))
    messages.append(str(parallel_state.get_virtual_pipeline_model_parallel_world_size()))
    return messages


def draws() -> tuple[float, float, float, float]:
    """Random numbers of this rank: torch's and numpy's, those cut over tp, and torch's again under the same seed."""
    process_groups.seed(5)
    first = float(torch.rand(()))
    with tensor_parallel.get_cuda_rng_tracker().fork():
        own = float(torch.rand(()))
    other = float(np.random.rand())
    process_groups.seed(5)
    return first, other, own, float(torch.rand(()))


def changes() -> list[tuple[str, float, int]]:
    """Per layout that four ranks go through: its name, a sum over its tensor-parallel group, and the open files afterwards."""
    seen = []
    for topology in (Topology(tp=4), Topology(pp=2, vpp=2, dp=2), Topology(tp=2, pp=2), *([Topology(dp=4), Topology(tp=4)] * 4)):
        process_groups.change(topology)
        one = torch.ones(1)
        torch.distributed.all_reduce(one, group=parallel_state.get_tensor_model_parallel_group())
        seen.append((str(process_groups.current()), float(one), len(list(Path("/proc/self/fd").iterdir()))))
    return seen


def wrong_change() -> str:
    try:
        process_groups.change(Topology(tp=8))
    except ConfigError as error:
        return f"{process_groups.current()}: {error}"
    return ""


class Aloof(BaseException):
    """Passes every `except Exception`, as torch's CheckpointException does."""


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


def failing_together() -> list[str]:
    """What this rank hears where rank 1 alone fails inside `raise_together`, error by error."""
    heard = []
    for error in (ConfigError("x=1 must be 2."), KeyError("lost\ud800"), Aloof("gone"), Mute()):
        try:
            with collectives.raise_together("trying"):
                if dist.get_rank() == 1:
                    raise error
        except BaseException as caught:
            heard.append(f"{type(caught).__name__}: {message(caught)}")
    return heard
