"""Times of an import and an export of all ranks where storage is the limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megabridge.config.plan_schema import PlanConfig
from megabridge.parallel.topology import Topology
from megabridge.planning.all_ranks import RankCost


@dataclass(frozen=True)
class StorageTime:
    """Bytes and seconds of one direction: of the rank and the host that move most, and of all ranks together."""

    most_of_a_rank: int
    most_of_a_host: int
    total: int
    seconds: float


def storage_times(
    plan: PlanConfig, topology: Topology, costs: Mapping[int, RankCost], *, per_host: int
) -> tuple[StorageTime, StorageTime]:
    """Returns (import, export) with ranks filling hosts of `per_host` one after another; `costs` are of the ranks that write.

    Every rank reads its own boxes, replicas too; each box is written once. A host moves `plan.storage_gbs` GB/s, and all hosts
    together at most `plan.storage_total_gbs`.
    """
    writers = max(topology.tp, topology.expert_tp * topology.ep)
    read: list[int] = []
    written: list[int] = []
    for rank in range(topology.world_size):
        stage, inside = divmod(rank, topology.stage_size)
        cost = costs[stage * topology.stage_size + inside % writers]
        read.append(cost.fed_bytes)
        written.append(cost.written_bytes if inside < writers else 0)
    return _time(plan, read, per_host), _time(plan, written, per_host)


def _time(plan: PlanConfig, moved: list[int], per_host: int) -> StorageTime:
    hosts = [sum(moved[first : first + per_host]) for first in range(0, len(moved), per_host)]
    seconds = max(hosts) / (plan.storage_gbs * 1e9)
    if plan.storage_total_gbs is not None:
        seconds = max(seconds, sum(moved) / (plan.storage_total_gbs * 1e9))
    return StorageTime(max(moved), max(hosts), sum(moved), seconds)
