"""Enumerates the parallel layouts that a number of ranks allows for a model."""

from __future__ import annotations

from collections.abc import Iterator

from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config import layout_rules
from megabridge.config.schema import Config
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.parallel.topology import Topology


def legal_layouts(config: Config, bridge: AutoBridge, world_size: int) -> list[ParallelLayout]:
    """Returns every layout of `world_size` ranks that the bridge's model allows, the one without model parallelism first.

    dp follows from the other sizes; vpp is 1 or 2. Tensor parallelism without a pipeline is tried with and without sequence
    parallelism; for a model with experts it always comes with it.
    """
    native, backend = bridge.source.native, layout_rules.backend_of_run(config)

    def is_legal(layout: ParallelLayout) -> bool:
        get = layout_rules.of_run(layout.config(config), native)
        return not layout_rules.model_problems(get, layout.topology, backend=backend)

    has_experts = native.get("num_moe_experts") is not None
    return list(filter(is_legal, _candidates(world_size, has_experts=has_experts)))


def _candidates(world_size: int, *, has_experts: bool) -> Iterator[ParallelLayout]:
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    for pp in sizes:
        for vpp in (1, 2) if pp > 1 else (1,):
            for tp in (size for size in sizes if world_size % (pp * size) == 0):
                if has_experts:
                    yield from _with_experts(world_size, tp=tp, pp=pp, vpp=vpp)
                    continue
                topology = Topology.for_world(world_size, tp=tp, pp=pp, vpp=vpp)
                yield ParallelLayout(topology)
                if tp > 1 and pp == 1:
                    yield ParallelLayout(topology, sequence_parallel=True)


def _with_experts(world_size: int, *, tp: int, pp: int, vpp: int) -> Iterator[ParallelLayout]:
    """Yields every expert parallel size, with experts cut over tp ranks or not at all."""
    inside = world_size // pp
    for etp in sorted({1, tp}):
        for ep in (size for size in range(1, inside // etp + 1) if inside % (etp * size) == 0):
            yield ParallelLayout(Topology.for_world(world_size, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp), sequence_parallel=tp > 1)
