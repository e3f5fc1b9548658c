"""What processes do in the tests of plans for ranks that don't run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.config import schema
from megabridge.conversion.parameters import ParameterRecord, collect_parameters
from megabridge.conversion.plan import Expansion, tile
from megabridge.errors import MegabridgeError
from megabridge.launchers.prepare import resolve
from megabridge.mapping import Cut, Dims
from megabridge.models.provider import ModelProvider
from megabridge.parallel import process_groups
from megabridge.parallel.topology import Topology
from megabridge.planning.all_ranks import AllRanksPlan, plan_all_ranks
from megabridge.training import build
from tests.support.compose import compose
from tests.support.convert import provide


def seen_by_ranks(config: dict[str, Any], dtype: str, **settings: Any) -> dict[str, Any]:
    """On real ranks: this one's records, the plan's sources and sums."""
    bridge = AutoBridge.from_hf_config(config, dtype=dtype)
    topology = process_groups.current()
    assert topology is not None
    if bridge.source.native.get("num_moe_experts") is not None:
        settings["sequence_parallel"] = topology.tp > 1
    model = provide(bridge, load_weights=False, **settings)
    plan = bridge.plan(model)
    written = {
        name: sum(s.transfer.elements for s in sources if s.rank == torch.distributed.get_rank())
        for name, sources in plan.sources.items()
    }
    parameters = [live.data for live in collect_parameters(model)]
    return {
        "records": [plain(live.record) for live in collect_parameters(model)],
        "sources": {name: [(s.rank, s.native, repr(s.transfer)) for s in sources] for name, sources in plan.sources.items()},
        "tensors": {name: (spec.shape, str(spec.dtype)) for name, spec in plan.tensors.items()},
        "share": {
            "parameters": sum(p.numel() for p in parameters),
            "held_bytes": sum(p.nbytes for p in parameters),
            "fed_bytes": plan.owned_bytes,
            "written_bytes": sum(count * plan.tensors[name].dtype.itemsize for name, count in written.items()),
            "transfers": sum(len(item.transfers) for item in plan.items),
        },
    }


def seen_by_one(config: dict[str, Any], dtype: str, layout: Topology, **settings: Any) -> dict[str, Any]:
    """The same for every rank of `layout`, in a process without groups."""
    world = planned(config, dtype, layout, **settings)
    shares = {rank: asdict(share) for rank, share in world.costs().items()}
    assert not torch.distributed.is_initialized() and process_groups.current() is None
    return {
        "records": [[plain(record) for record in world.records(rank)] for rank in range(layout.world_size)],
        "sources": {name: [(s.rank, s.native, repr(s.transfer)) for s in sources] for name, sources in world.sources.items()},
        "tensors": {name: (spec.shape, str(spec.dtype)) for name, spec in world.tensors.items()},
        "shares": shares,
    }


def seen_by_one_of_many(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [seen_by_one(**case) for case in cases]


def plain(record: ParameterRecord) -> tuple[Any, ...]:
    return (record.name, record.shape, str(record.dtype), record.cuts, record.is_writer, record.is_expert)


def planned(config: dict[str, Any], dtype: str, layout: Topology, **settings: Any) -> AllRanksPlan:
    bridge = AutoBridge.from_hf_config(config, dtype=dtype)
    return plan_all_ranks(bridge.source.family, bridge.source.native, finalized(bridge, layout, **settings), layout)


def finalized(bridge: AutoBridge, layout: Topology, **settings: Any) -> ModelProvider:
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = layout.tp
    provider.pipeline_model_parallel_size = layout.pp
    provider.virtual_pipeline_model_parallel_size = layout.vpp if layout.vpp > 1 else None
    provider.expert_model_parallel_size, provider.expert_tensor_parallel_size = layout.ep, layout.etp
    provider.sequence_parallel = layout.tp > 1 and bridge.source.native.get("num_moe_experts") is not None
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    return provider


def published(model: str, parallel: list[str]) -> dict[str, Any]:
    """The plan of a model of conf/model under a layout of many ranks."""
    run = resolve(compose("recipe=plan", f"model={model}", "platform=cpu", *parallel), Path("run"))[1]
    run.model.load_weights = False
    bridge = AutoBridge.from_hf_config(run.model.hf, dtype=run.model.dtype)
    begin = time.process_time()
    world = plan_all_ranks(bridge.source.family, bridge.source.native, build.provider(run, bridge), schema.topology(run.parallel))
    shares = world.costs()
    return {
        "seconds": time.process_time() - begin,
        "ranks": world.topology.world_size,
        "tensors": len(world.tensors),
        "parameters": sum(prod(spec.shape) for spec in world.tensors.values()),
        "bytes": world.bytes,
        "written": sum(share.written_bytes for share in shares.values()),
        "unfed": {share.held_bytes - share.fed_bytes for share in shares.values()},
        "layers": [len({r.name.split(".")[2] for r in stage if r.name.startswith("decoder.layers.")}) for stage in world.stages],
        "held": max(share.held_bytes for share in shares.values()),
    }


def large(config: dict[str, Any], layout: Topology) -> dict[str, Any]:
    """A layout of thousands of ranks: how many hold, and write, what."""
    world = planned(config, "bfloat16", layout)
    shares = world.costs(max_shard_size="64KB")
    return {
        "written": sum(share.written_bytes for share in shares.values()),
        "bytes": world.bytes,
        "writers": sorted(shares),
        "last": world.records(layout.world_size - 1)[-1],
        "files": max(share.files for share in shares.values()),
    }


Damage = Callable[[int, ParameterRecord], list[ParameterRecord]]

DAMAGES: dict[str, Damage] = {
    "lost": lambda rank, r: [] if rank == 1 and r.name.endswith("1.mlp.linear_fc1.weight") else [r],
    "twice": lambda rank, r: [replace(r, is_writer=True)],
    "same share": lambda rank, r: [replace(r, cuts=(replace(r.cuts[0], index=0),))] if r.cuts and r.name.endswith("1.mlp.linear_fc2.weight") else [r],
    "stride": lambda rank, r: [replace(r, cuts=(Cut(0, 2, 2, rank),))] if r.cuts and rank == 1 and "linear_qkv.weight" in r.name else [r],
    "shape": lambda rank, r: [replace(r, shape=(r.shape[0] * 2, *r.shape[1:]))] if rank == 1 and "linear_proj.weight" in r.name else [r],
    "unknown": lambda rank, r: [replace(r, name="decoder.wings.weight")] if "final" in r.name else [r],
    "dtype": lambda rank, r: [replace(r, dtype=torch.float16)] if rank == 1 and "linear_proj.weight" in r.name else [r],
}  # fmt: skip


def damaged(config: dict[str, Any]) -> dict[str, str]:
    """What is said of records of tp2 in which one thing is wrong; counts alone would miss some."""
    bridge = AutoBridge.from_hf_config(config, dtype="float32")
    world = planned(config, "float32", Topology(tp=2))
    said = {}
    for name, damage in DAMAGES.items():
        records = [[new for record in world.records(rank) for new in damage(rank, record)] for rank in range(2)]
        try:
            tile(Expansion(bridge.source.family, Dims.of(bridge.source.native)), records)
            said[name] = ""
        except MegabridgeError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def refused_with_groups(config: dict[str, Any]) -> str:
    try:
        planned(config, "float32", Topology(tp=2))
    except MegabridgeError as error:
        return f"{type(error).__name__}: {error}"
    return ""
