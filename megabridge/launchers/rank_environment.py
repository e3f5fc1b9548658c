"""Reads rank and world size from the environment of torchrun (RANK, ...) or srun (SLURM_PROCID, ...). No torch."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megabridge.errors import ConfigError


@dataclass(frozen=True)
class RankEnvironment:
    """A rank's settings for torch's env:// rendezvous."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    def environ(self) -> dict[str, str]:
        """Returns them as environment variables, named as by torchrun."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }

    @classmethod
    def all_on_this_host(cls, world_size: int) -> list[RankEnvironment]:
        """Returns the settings of `world_size` ranks on this host, with a port that is free now."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        return [cls(rank, world_size, rank, world_size, "127.0.0.1", port) for rank in range(world_size)]


def find(environ: Mapping[str, str]) -> RankEnvironment | None:
    """Returns the rank that `environ` makes of this process, or None when the launcher has to start the ranks.

    A task of srun is a rank if its step has more than one task: in a batch script, or a step of one task, SLURM's variables
    are set too, but there are no other ranks. Raises ConfigError for an incomplete environment.
    """
    if "RANK" in environ:
        return _torchrun(environ)
    if "SLURM_PROCID" in environ:
        return _srun(environ)
    return None


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None or not text.isdecimal():
        raise ConfigError(f"{name}={text!r} must be a whole number in a rank of torchrun or srun.")
    return int(text)


def _torchrun(environ: Mapping[str, str]) -> RankEnvironment:
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if rank >= world_size:
        raise ConfigError(f"RANK={rank} must be less than WORLD_SIZE={world_size}.")
    address = environ.get("MASTER_ADDR", "127.0.0.1" if world_size == 1 else "")
    if not address:
        raise ConfigError("MASTER_ADDR must name rank 0's host where RANK is set; torchrun sets it.")
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", str(rank)),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", str(world_size)),
        master_addr=address,
        master_port=_number(environ, "MASTER_PORT", "29500"),
    )


def _srun(environ: Mapping[str, str]) -> RankEnvironment | None:
    rank = _number(environ, "SLURM_PROCID")
    in_step = "SLURM_STEP_NUM_TASKS" in environ or rank > 0
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")) if in_step else 1
    if world_size == 1:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world_size)
    per_node = expand_counts(counts)
    node = _number(environ, "SLURM_NODEID", "0")
    job, step = _number(environ, "SLURM_JOB_ID", "0"), _number(environ, "SLURM_STEP_ID", "0")
    return RankEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID", "0"),
        local_world_size=per_node[min(node, len(per_node) - 1)],
        master_addr=environ.get("MASTER_ADDR") or first_host(nodes),
        # Below Linux's ephemeral ports (32768), the same on all ranks, different for steps that share a node.
        master_port=_number(environ, "MASTER_PORT", str(20000 + (job * 31 + step) % 12000)),
    )


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `node[03-05,9],gpu1` -> `node03`."""
    head = re.split(r",(?![^\[]*\])", nodes, maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head)


def expand_counts(counts: str) -> list[int]:
    """SLURM's tasks per node, node by node: `8(x2),4` -> [8, 8, 4]."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(f"SLURM_TASKS_PER_NODE={counts!r} must read like 8(x2),4; start with srun.")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded
