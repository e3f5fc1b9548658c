"""Plan of all ranks in one process: every rank's transfers, their sums, and the check that they tile every tensor.

A layout of 2,048 ranks can be planned without running them: one meta-device chunk per pipeline stage and virtual stage has the
parameters of a stage, and the share of each rank in the stage is computed from its coordinate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from megabridge.conversion.parameters import ParameterRecord, collect_parameters
from megabridge.conversion.plan import Expansion, TensorSpec, WrittenBox, check_fits, tile, uncollected
from megabridge.conversion.shards import plan_shards
from megabridge.families import Family
from megabridge.hf.tensor_files import STAGING
from megabridge.mapping import Dims, Transfer
from megabridge.mapping.tiling import flaw, native_boxes
from megabridge.models.provider import ModelProvider
from megabridge.parallel import process_groups
from megabridge.parallel.topology import Coordinate, Topology
from megabridge.platform.patches.half_precision import in_half_precision


@dataclass(frozen=True, slots=True)
class RankCost:
    """Cost of one rank: what it holds, reads and writes, in bytes of the parameters' dtypes.

    `held_bytes` are its parameters, `fed_bytes` are copied into them from files by an import, `written_bytes` are copied out of
    them by an export. `contiguous_runs` of bytes in files is the least number of reads of an import without memory mapping.
    `staging_bytes` is the largest copy that a conversion holds besides the parameters, `files` the number of an export's files that
    the rank writes to.
    """

    parameters: int
    held_bytes: int
    fed_bytes: int
    written_bytes: int
    transfers: int
    contiguous_runs: int
    staging_bytes: int
    files: int


@dataclass(frozen=True)
class AllRanksPlan:
    """Plan of all ranks of `topology`. `stages` has the records of the first rank of every pipeline stage.

    Its boxes tile every tensor and every parameter: otherwise `plan_all_ranks` raises.
    """

    topology: Topology
    tensors: Mapping[str, TensorSpec]
    sources: Mapping[str, tuple[WrittenBox, ...]]
    stages: tuple[tuple[ParameterRecord, ...], ...]
    expansion: Expansion = field(repr=False)

    def records(self, rank: int) -> tuple[ParameterRecord, ...]:
        """Returns the records that `conversion.parameters.collect_parameters` would find on `rank`, in module order."""
        place = self.topology.coordinate(rank)
        return tuple(record_at(record, place, self.topology.ep) for record in self.stages[place.pp])

    @cached_property
    def bytes(self) -> int:
        """Bytes of all tensors, in the parameters' dtypes."""
        return sum(prod(spec.shape) * spec.dtype.itemsize for spec in self.tensors.values())

    def costs(self, max_shard_size: str | int | None = None) -> dict[int, RankCost]:
        """Returns the cost of each rank that writes; every other rank holds as much as one of these and writes nothing.

        `max_shard_size` determines the files of an export.
        """
        shards = plan_shards(Path(), self.tensors, max_shard_size)
        file_of = {name: number for number, shard in enumerate(shards) for name in shard.tensors}
        files: dict[int, set[int]] = {}
        for name, sources in self.sources.items():
            for source in sources:
                files.setdefault(source.rank, set()).add(file_of[name])
        sums = _Sums(self.expansion)
        with uncollected():
            return {rank: sums.cost(self.records(rank), len(files.get(rank, ()))) for rank in _first_replicas(self.topology)}


def plan_all_ranks(family: Family, native: Mapping[str, Any], provider: ModelProvider, topology: Topology) -> AllRanksPlan:
    """Plans every rank of `topology` for a finalized provider with its sizes, in a process without groups. Builds no weights.

    Raises MappingError when a parameter has no rule, shapes contradict each other, or the boxes that ranks write don't tile every
    tensor exactly once, and ConfigError when this process has groups.
    """
    expansion = Expansion(family, Dims.of(native))
    stages = tuple(_stage(provider, topology, pp) for pp in range(topology.pp))
    with uncollected():
        tensors, sources = tile(expansion, _writers(stages, topology))
        check_fits(_unfilled(expansion))
    return AllRanksPlan(topology, tensors, sources, stages, expansion)


def record_at(record: ParameterRecord, place: Coordinate, ep: int) -> ParameterRecord:
    """Returns the record of the rank at `place` for the parameter whose `record` is that of the first rank of the stage.

    Ranks of a stage hold the same parameters: tp determines the share of a sharded one, ep the experts, and the first of equal
    copies is written.
    """
    if record.is_expert:
        return _expert_record_at(record, place, ep)
    cuts = record.cuts
    if cuts and cuts[0].index != place.tp:
        cuts = (replace(cuts[0], index=place.tp),)
    is_writer = place.dp == place.cp == 0 and (bool(cuts) or place.tp == 0) and not record.is_copy
    return ParameterRecord(record.name, record.shape, record.dtype, cuts, is_writer, is_copy=record.is_copy)


def _expert_record_at(record: ParameterRecord, place: Coordinate, ep: int) -> ParameterRecord:
    rows, *within = record.cuts
    name = record.name
    if rows.drops:  # one expert; the first rank's come first
        expert = rows.index + place.ep * (rows.size // ep)
        name, rows = name.replace(f".experts.{rows.index}.", f".experts.{expert}."), replace(rows, index=expert)
    else:
        rows = replace(rows, index=place.ep)
    cuts = (rows, *(replace(cut, index=place.etp) for cut in within))
    is_writer = place.edp == 0 and (bool(within) or place.etp == 0)
    return ParameterRecord(name, record.shape, record.dtype, cuts, is_writer, is_expert=True)


@contextlib.contextmanager
def fake_stage(provider: ModelProvider, topology: Topology, pp: int) -> Iterator[list[torch.nn.Module]]:
    """Yields the bare meta chunks of the first rank of a stage, inside fake process groups in which this process is that rank.

    Raises ConfigError when this process has groups.
    """
    widths = range(1, topology.dp + 1)
    dp = next(dp for dp in widths if topology.tp * topology.cp * dp % (topology.expert_tp * topology.ep) == 0)
    narrow = replace(topology, dp=dp)  # as few replicas as possible, which only cost time
    with process_groups.fake_groups(narrow, narrow.rank(pp=pp)):
        numbers: list[int | None] = list(range(topology.vpp)) if topology.vpp > 1 else [None]
        yield [provider.provide(vp_stage=number, init="meta") for number in numbers]


def _stage(provider: ModelProvider, topology: Topology, pp: int) -> tuple[ParameterRecord, ...]:
    """The records of the first rank of a stage, from meta chunks."""
    with fake_stage(provider, topology, pp) as chunks:
        if provider.config.bf16 or provider.config.fp16:
            chunks = [in_half_precision(provider.config, chunk) for chunk in chunks]
        return tuple(live.record for live in collect_parameters(chunks))


def _first_replicas(topology: Topology) -> list[int]:
    """The ranks that write: the first of those with equal dense parameters, and of those with equal experts."""
    inside = max(topology.tp, topology.expert_tp * topology.ep)
    return [pp * topology.stage_size + place for pp in range(topology.pp) for place in range(inside)]


def _writers(stages: tuple[tuple[ParameterRecord, ...], ...], topology: Topology) -> Iterator[Iterator[ParameterRecord]]:
    """Yields for each rank the records that it writes."""
    first = set(_first_replicas(topology))
    for rank in range(topology.world_size):
        place = topology.coordinate(rank)
        yield (record_at(record, place, topology.ep) for record in (stages[place.pp] if rank in first else ()))


def _unfilled(expansion: Expansion) -> list[str]:
    """A line for every parameter whose native boxes overlap or reach outside. Elements in no box are vocabulary padding."""
    problems = []
    for entry in expansion.distinct:
        shape = local_shape(entry.record)
        if (found := flaw(shape, native_boxes(entry.transfers), allow_gaps=True)) is not None:
            problems.append(f"{entry.record.name} {shape}, share {entry.record.cuts}: {found}")
    return problems


def local_shape(record: ParameterRecord) -> tuple[int, ...]:
    """The shape of the parameter on the record's rank."""
    shape = list(record.shape)
    for cut in record.cuts:
        shape[cut.dim] //= cut.size
    return tuple(length for dim, length in enumerate(shape) if not any(cut.drops and cut.dim == dim for cut in record.cuts))


@dataclass(slots=True)
class _Sums:
    """Adds up the costs of ranks. The figures of a parameter's transfers are cached, since layers repeat them."""

    expansion: Expansion
    known: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # elements fed, contiguous runs, largest transfer

    def cost(self, records: tuple[ParameterRecord, ...], files: int) -> RankCost:
        held = held_bytes = fed_bytes = written = count = runs = staging = 0
        for record in records:
            entry = self.expansion.entry(record)
            size, elements = record.dtype.itemsize, prod(local_shape(record))
            fed, pieces, largest = self._figures(entry.transfers)
            held += elements
            held_bytes += elements * size
            fed_bytes += fed * size
            written += fed * size if entry.is_writer else 0
            count += len(entry.transfers)
            runs += pieces
            staging = max(staging, min(largest, STAGING) * size)
        return RankCost(held, held_bytes, fed_bytes, written, count, runs, staging, files)

    def _figures(self, moves: tuple[Transfer, ...]) -> tuple[int, int, int]:
        if id(moves) not in self.known:
            sizes = [move.elements for move in moves]
            self.known[id(moves)] = sum(sizes), sum(move.contiguous_run_count for move in moves), max(sizes, default=0)
        return self.known[id(moves)]
