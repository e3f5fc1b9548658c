"""Starts and stops the process groups of a topology, and seeds each rank's random generators."""

from __future__ import annotations

import dataclasses
import os
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore

import megabridge.platform as platform
from megabridge.errors import ConfigError
from megabridge.parallel.topology import Topology

platform.prepare()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402

DEFAULT_SEED: Final = 1234
DEFAULT_TIMEOUT: Final = 600.0
"""Seconds that a collective waits for other ranks."""


@dataclass
class _Started:
    topology: Topology | None = None
    timeout: float = DEFAULT_TIMEOUT
    listener: socket.socket | None = None
    """For a forked rank: the socket on which rank 0's store listens."""


_started = _Started()


def current() -> Topology | None:
    """Returns the topology whose groups exist in this process, or None."""
    return _started.topology


def running() -> Topology:
    """Returns the topology of megatron-core's groups, whoever started them; the same on every rank."""
    sizes = {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp": parallel_state.get_context_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }
    return Topology.of_sizes(sizes)


def become_forked_rank(listener: socket.socket, *, threads: int) -> None:
    """Prepares this forked process for `start`: it meets the other ranks at `listener` and computes with `threads` threads."""
    _started.listener = listener
    torch.set_num_threads(threads)


def start(
    topology: Topology,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    init_method: str | None = None,
    seed: int = DEFAULT_SEED,
    timeout: float = DEFAULT_TIMEOUT,
) -> None:
    """Starts torch's process group (gloo on a CPU, nccl on CUDA) and megatron-core's groups. Every rank calls it.

    `rank` and `world_size` default to the environment's RANK and WORLD_SIZE (of torchrun, or a forked rank), or to a
    single process. A process group that exists already is used as it is. A collective of any of these groups waits at most
    `timeout` seconds for the other ranks. Raises ConfigError when the number of processes is not `topology.world_size`, or
    when MEGABRIDGE_PLATFORM=cuda finds no CUDA device.
    """
    if _started.topology is not None:
        raise ConfigError(f"groups of {_started.topology} exist already; call process_groups.stop() before process_groups.start().")
    if not dist.is_initialized():
        rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
        _check_world(topology, world_size)
        _start_torch(rank, world_size, init_method, timeout)
    _check_world(topology, dist.get_world_size())
    _started.timeout = timeout
    _start_megatron(topology)
    _seed(seed)


def _start_megatron(topology: Topology, **options: bool) -> None:
    parallel_state.initialize_model_parallel(
        **topology.settings(),
        distributed_timeout_minutes=_started.timeout / 60,  # each group has its own, half an hour by default
        **options,
    )
    _started.topology = topology


@contextmanager
def fake_groups(topology: Topology, rank: int) -> Iterator[None]:
    """Fake process groups in which this process is `rank` of `topology`, to build meta-device chunks of ranks that don't run.

    Nothing is sent: collectives leave their arguments unchanged. Raises ConfigError when groups exist already.
    """
    if dist.is_initialized():
        raise ConfigError(
            "ranks that don't run are planned in a process without groups, but this one has some; call process_groups.stop()."
        )
    hook = sys.excepthook  # torch replaces it with one that names the rank
    dist.init_process_group("fake", rank=rank, world_size=topology.world_size)
    try:
        _start_megatron(topology, create_gloo_process_groups=False)  # gloo groups need all their ranks to run
        yield
    finally:
        stop()
        sys.excepthook = hook


def ensure(topology: Topology) -> None:
    """Makes the groups of `topology` current, starting them when no groups exist. Every rank calls it.

    A single process needs no set-up by the user. Only vpp may differ from the running groups: it is a property of the
    model, not of the groups. Raises ConfigError, with the torchrun command, when more processes are needed.
    """
    running = _started.topology
    if running is None:
        start(topology)
        return
    if _groups_of(running) != _groups_of(topology):
        raise ConfigError(
            f"the process groups of this process are {running}, but the model needs {topology}; "
            "call process_groups.stop() first or use the same sizes."
        )
    if running.vpp != topology.vpp:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(topology.vpp if topology.vpp > 1 else None)
        _started.topology = topology


def change(topology: Topology, *, seed: int = DEFAULT_SEED) -> None:
    """Replaces megatron-core's groups by those of `topology` over the same processes. Every rank calls it.

    Models built before must not be used any more. Raises ConfigError if `topology` needs another number of processes.
    """
    if dist.is_initialized():
        _check_world(topology, dist.get_world_size())
    own = parallel_state._global_process_group_list or []
    _started.topology = None
    parallel_state.destroy_model_parallel()
    # megatron-core destroys some of its groups and forgets the others, which would keep their connections open.
    for group in own:
        if group is not None and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)
    start(topology, seed=seed, timeout=_started.timeout)


def _groups_of(topology: Topology) -> Topology:
    """The topology without vpp: equal for topologies with equal groups."""
    return dataclasses.replace(topology, vpp=1)


def world_size(default: int = 1) -> int:
    """Number of processes of this job: of the running group, else the environment's WORLD_SIZE, else `default`."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", str(default)))


def stop(*, for_good: bool = True) -> None:
    """Destroys megatron-core's groups and torch's. Does nothing when there are none. Every rank calls it.

    With `for_good=False` groups can be started again: torch's group is kept if there are several ranks, because they
    can't use the same store for a second rendezvous.
    """
    _started.topology = None
    parallel_state.destroy_model_parallel()
    if dist.is_initialized() and (for_good or dist.get_world_size() == 1):
        dist.destroy_process_group()


def seed(value: int) -> None:
    """Seeds Python, numpy, torch and megatron-core's generators for this rank.

    Data-parallel replicas get equal seeds, pipeline stages and tensor-parallel ranks different ones (as
    megatron/training/initialize.py does). Needs the groups of `start`.
    """
    if value < 0:
        raise ConfigError(f"seed={value} must not be negative.")
    own = value + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(own)


def _check_world(topology: Topology, world_size: int) -> None:
    needed = topology.world_size
    if needed != world_size:
        processes = "process runs" if world_size == 1 else "processes run"
        raise ConfigError(
            f"{topology} needs {needed} processes, but {world_size} {processes}; "
            f"start it with `torchrun --nproc-per-node={needed} <script>`, or change the sizes in parallel."
        )


def _start_torch(rank: int, world_size: int, init_method: str | None, timeout: float) -> None:
    where: dict[str, Any] = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=timeout)}
    if platform.is_cpu():
        where["backend"] = "gloo"
    elif torch.cuda.is_available():
        if world_size > 1 or "LOCAL_RANK" in os.environ:  # a single process keeps the device that it chose
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        where["backend"] = "nccl"
    else:
        raise ConfigError("MEGABRIDGE_PLATFORM=cuda, but torch sees no CUDA device; set it to cpu or auto.")
    if init_method is not None:
        where["init_method"] = init_method
    elif world_size == 1:
        where["store"] = HashStore()
    elif _started.listener is not None:
        where["store"] = _forked_store(_started.listener, rank, world_size)
    else:
        where["init_method"] = "env://"
    dist.init_process_group(**where)


def _forked_store(listener: socket.socket, rank: int, world_size: int) -> Store:
    host, port = listener.getsockname()
    if rank != 0:
        return TCPStore(host, port, world_size=world_size, is_master=False)
    return TCPStore(host, port, world_size=world_size, is_master=True, master_listen_fd=os.dup(listener.fileno()))


_seed = seed  # `start` has an argument of that name
