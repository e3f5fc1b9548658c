"""The plan of a whole job in one process: every rank's transfers, their sums, and the proof that they tile every tensor.

A layout of 2,048 ranks needs none of them: one meta-device chunk per pipeline stage and virtual stage says what a stage holds, and
where a rank sits in the stage is arithmetic.
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
    """What one rank holds and moves, in bytes of the parameters' dtypes.

    `held_bytes` are its parameters, `fed_bytes` what an import copies into them out of files, `written_bytes` what an export copies
    out of them. The box of a transfer is made of stretches of consecutive bytes in a file: `stretches` is how many reads an import
    takes at least where nothing is mapped. `staging_bytes` is the largest copy that a walk holds beside the parameters, `files` how
    many files of an export it writes into.
    """

    parameters: int
    held_bytes: int
    fed_bytes: int
    written_bytes: int
    transfers: int
    stretches: int
    staging_bytes: int
    files: int


@dataclass(frozen=True)
class AllRanksPlan:
    """All ranks of `topology`. `stages` holds the records of the first rank of every pipeline stage.

    That it exists is the proof: `plan_all_ranks` raises where the boxes of all ranks don't tile every tensor and every parameter.
    """

    topology: Topology
    tensors: Mapping[str, TensorSpec]
    sources: Mapping[str, tuple[WrittenBox, ...]]
    stages: tuple[tuple[ParameterRecord, ...], ...]
    expansion: Expansion = field(repr=False)

    def records(self, rank: int) -> tuple[ParameterRecord, ...]:
        """The records that `conversion.parameters.collect_parameters` finds on `rank`, in module order."""
        place = self.topology.coordinate(rank)
        return tuple(record_at(record, place, self.topology.ep) for record in self.stages[place.pp])

    @cached_property
    def bytes(self) -> int:
        """Of all tensors, in the parameters' dtypes."""
        return sum(prod(spec.shape) * spec.dtype.itemsize for spec in self.tensors.values())

    def shares(self, max_shard_size: str | int | None = None) -> dict[int, RankCost]:
        """What ranks move, by rank, for those that write; every other rank holds as much as one of these and writes nothing.

        `max_shard_size` decides which files an export has.
        """
        shards = plan_shards(Path(), self.tensors, max_shard_size)
        file_of = {name: number for number, shard in enumerate(shards) for name in shard.tensors}
        files: dict[int, set[int]] = {}
        for name, sources in self.sources.items():
            for source in sources:
                files.setdefault(source.rank, set()).add(file_of[name])
        sums = _Sums(self.expansion)
        with uncollected():
            return {rank: sums.share(self.records(rank), len(files.get(rank, ()))) for rank in _first_replicas(self.topology)}


def plan_all_ranks(family: Family, native: Mapping[str, Any], provider: ModelProvider, topology: Topology) -> AllRanksPlan:
    """Plans every rank of `topology` for a finalized provider of these sizes, in a process without groups. Builds no weights.

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
    """What the rank at `place` says of a parameter of which `record` is the first rank's of its stage.

    Ranks of a stage hold the same parameters: tp decides the share of a cut one, ep that of the experts, and of equal copies the
    first is written.
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
    """The bare chunks, without memory, of the first rank of a stage, among groups in which this process believes to be that rank.

    Raises ConfigError when this process has groups.
    """
    widths = range(1, topology.dp + 1)
    dp = next(dp for dp in widths if topology.tp * topology.cp * dp % (topology.expert_tp * topology.ep) == 0)
    narrow = replace(topology, dp=dp)  # replicas only cost time
    with process_groups.fake_groups(narrow, narrow.rank(pp=pp)):
        numbers: list[int | None] = list(range(topology.vpp)) if topology.vpp > 1 else [None]
        yield [provider.provide(vp_stage=number, init="meta") for number in numbers]


def _stage(provider: ModelProvider, topology: Topology, pp: int) -> tuple[ParameterRecord, ...]:
    """The records of the first rank of a stage, from chunks without memory."""
    with fake_stage(provider, topology, pp) as chunks:
        if provider.config.bf16 or provider.config.fp16:
            chunks = [in_half_precision(provider.config, chunk) for chunk in chunks]
        return tuple(live.record for live in collect_parameters(chunks))


def _first_replicas(topology: Topology) -> list[int]:
    """The ranks that write anything: the first of equal copies of dense parameters, and of experts."""
    inside = max(topology.tp, topology.expert_tp * topology.ep)
    return [pp * topology.stage_size + place for pp in range(topology.pp) for place in range(inside)]


def _writers(stages: tuple[tuple[ParameterRecord, ...], ...], topology: Topology) -> Iterator[Iterator[ParameterRecord]]:
    """By rank, what it writes."""
    first = set(_first_replicas(topology))
    for rank in range(topology.world_size):
        place = topology.coordinate(rank)
        yield (record_at(record, place, topology.ep) for record in (stages[place.pp] if rank in first else ()))


def _unfilled(expansion: Expansion) -> list[str]:
    """A line for every arrangement whose native boxes overlap or reach out. Elements in no box are vocabulary padding."""
    problems = []
    for entry in expansion.distinct:
        shape = local_shape(entry.record)
        if (found := flaw(shape, native_boxes(entry.transfers), allow_gaps=True)) is not None:
            problems.append(f"{entry.record.name} {shape}, share {entry.record.cuts}: {found}")
    return problems


def local_shape(record: ParameterRecord) -> tuple[int, ...]:
    """The shape of the parameter that the record's rank holds."""
    shape = list(record.shape)
    for cut in record.cuts:
        shape[cut.dim] //= cut.size
    return tuple(length for dim, length in enumerate(shape) if not any(cut.drops and cut.dim == dim for cut in record.cuts))


@dataclass(slots=True)
class _Sums:
    """Adds up shares. The figures of a parameter's transfers are counted once: layers repeat them."""

    expansion: Expansion
    known: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # elements fed, stretches, largest transfer

    def share(self, records: tuple[ParameterRecord, ...], files: int) -> RankCost:
        held = held_bytes = fed_bytes = written = count = stretches = staging = 0
        for record in records:
            entry = self.expansion.entry(record)
            size, elements = record.dtype.itemsize, prod(local_shape(record))
            fed, pieces, largest = self._figures(entry.transfers)
            held += elements
            held_bytes += elements * size
            fed_bytes += fed * size
            written += fed * size if entry.is_writer else 0
            count += len(entry.transfers)
            stretches += pieces
            staging = max(staging, min(largest, STAGING) * size)
        return RankCost(held, held_bytes, fed_bytes, written, count, stretches, staging, files)

    def _figures(self, moves: tuple[Transfer, ...]) -> tuple[int, int, int]:
        if id(moves) not in self.known:
            sizes = [move.elements for move in moves]
            self.known[id(moves)] = sum(sizes), sum(move.contiguous_run_count for move in moves), max(sizes, default=0)
        return self.known[id(moves)]
