"""The plan: every transfer between the ranks' parameters and the Hugging Face tensors, made once from the model in memory."""

from __future__ import annotations

import gc
import pickle
import sys
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Self

import torch

from megabridge.conversion.parameters import LocalParameter, ParameterRecord
from megabridge.errors import MappingError, listed
from megabridge.families import Family
from megabridge.hf import checkpoint_kinds
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.mapping import Cut, Dims, Resolved, Transfer, natural, transfers
from megabridge.mapping.tiling import Flaw, flaw, hf_boxes
from megabridge.parallel import collectives


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """A parameter of any rank and the transfers that fill it.

    `hf` names the tensors that the transfers' part numbers refer to, `shapes` are the whole shapes of these tensors.
    """

    record: ParameterRecord
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transfers: tuple[Transfer, ...]
    is_tied_copy: bool

    @property
    def is_writer(self) -> bool:
        return self.record.is_writer and not self.is_tied_copy


@dataclass(frozen=True, slots=True)
class LocalItem(PlannedParameter):
    """An entry of the plan, with this rank's parameter."""

    local: LocalParameter

    @classmethod
    def of(cls, entry: PlannedParameter, parameter: LocalParameter) -> Self:
        """Returns `entry` with `parameter`, whose record it has."""
        return cls(entry.record, entry.hf, entry.shapes, entry.transfers, entry.is_tied_copy, parameter)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A Hugging Face tensor as the model determines it: its whole shape, and the dtype of the parameter that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class WrittenBox:
    """A box of a tensor, the rank that writes it, and the canonical name of that rank's parameter."""

    rank: int
    native: str
    transfer: Transfer


@dataclass(frozen=True)
class Plan:
    """This rank's entries, bound to parameters in `items`, and the tensors of all ranks in natural order.

    `sources` has by tensor the boxes that tile it and their writers, ordered by rank and module; it is equal on every rank.
    `aliases` maps additional tensors that files may hold to the tensors they equal. `records` has by rank those of the parameters
    that it writes.
    """

    entries: tuple[PlannedParameter, ...]
    items: tuple[LocalItem, ...]
    tensors: Mapping[str, TensorSpec]
    sources: Mapping[str, tuple[WrittenBox, ...]]
    aliases: Mapping[str, str]
    family: Family
    dims: Dims
    records: tuple[tuple[ParameterRecord, ...], ...]

    def unbound(self) -> Plan:
        """Returns the plan without parameters, so that keeping it doesn't keep them alive."""
        return replace(self, items=())

    def bound(self, parameters: Sequence[LocalParameter]) -> Plan:
        """Returns the plan for parameters that have the records of `entries`, in the same order."""
        pairs = zip(self.entries, parameters, strict=True)
        return replace(self, items=tuple(LocalItem.of(entry, parameter) for entry, parameter in pairs))

    @cached_property
    def has_mtp(self) -> bool:
        """Whether the model was built with multi-token-prediction layers."""
        return any(record.name.startswith("mtp.") for held in self.records for record in held)

    def copies_of(self, tensor: str, present: Container[str]) -> list[str]:
        """Returns the names under which a folder holds `tensor`: its own, and those of the tied copies among `present`."""
        return [tensor, *(alias for alias, to in self.aliases.items() if to == tensor and alias in present)]

    def is_accepted(self, name: str) -> bool:
        """Whether a file may hold the tensor `name`, which no parameter takes: it is ignored, or passed through to exports."""
        return self.family.is_ignored(name) or self.is_passthrough(name)

    def is_passthrough(self, name: str) -> bool:
        """Whether `name` is a tensor of a multi-token-prediction layer that the model was built without."""
        return not self.has_mtp and self.family.is_passthrough(name, self.dims)

    @property
    def owned_bytes(self) -> int:
        """Bytes of this rank's parameters that some tensor feeds."""
        return sum(t.elements * item.local.parameter.element_size() for item in self.items for t in item.transfers)


class Expansion:
    """Expands records to entries by a family's rules. Resolves each name and cuts each shape once: ranks and layers repeat them."""

    def __init__(self, family: Family, dims: Dims) -> None:
        self.family = family
        self.dims = dims
        self._resolved: dict[str, Resolved | None] = {}
        self._names: dict[tuple[tuple[str, ...], int], tuple[str, ...]] = {}  # one tuple of 256 experts' names for all ranks
        self._first: dict[tuple[int, tuple[int, ...], tuple[Cut, ...]], PlannedParameter] = {}

    @property
    def distinct(self) -> list[PlannedParameter]:
        """One entry for each combination of layout, shape and cut so far, whose parameters share their transfers."""
        return list(self._first.values())

    def entry(self, record: ParameterRecord) -> PlannedParameter:
        """Returns the entry for `record`. Raises MappingError if no rule feeds the parameter, or its rule contradicts the shape."""
        name = record.name
        if name not in self._resolved:
            self._resolved[name] = self.family.weights.resolve(name, self.dims)
        rule = self._resolved[name]
        if rule is None:
            raise MappingError(f"no rule of {self.family.architecture} feeds the parameter {name} {record.shape}")
        key = (id(rule.layout), record.shape, record.cuts)  # the family holds its layouts for good
        first = self._first.get(key)
        if first is None:
            try:
                moves = transfers(rule.layout, record.shape, self.dims, record.cuts)
                shapes = tuple(rule.layout.part_shapes(record.shape, self.dims))
            except MappingError as error:
                raise MappingError(f"{name}: {error}") from error
            first = self._first[key] = PlannedParameter(record, self._named(rule, len(shapes)), shapes, moves, rule.is_tied_copy)
        return PlannedParameter(record, self._named(rule, len(first.shapes)), first.shapes, first.transfers, rule.is_tied_copy)

    def _named(self, rule: Resolved, count: int) -> tuple[str, ...]:
        found = self._names.get((rule.hf, count))
        if found is None:
            found = self._names[rule.hf, count] = rule.names(count)
        return found

    def entries(self, records: Iterable[ParameterRecord]) -> tuple[list[PlannedParameter], list[str]]:
        """Returns the entries of `records`, and a line for each record that has none."""
        out: list[PlannedParameter] = []
        problems: list[str] = []
        for record in records:
            try:
                out.append(self.entry(record))
            except MappingError as error:
                problems.append(str(error))
        return out, problems


def make_plan(family: Family, native: Mapping[str, object], parameters: Sequence[LocalParameter]) -> Plan:
    """Makes the plan for this rank's parameters. Collective: ranks exchange the records of the parameters that they write.

    Raises the same MappingError on every rank, listing every parameter that no rule feeds and every contradiction between shapes,
    or where the boxes that ranks write don't tile every tensor exactly once.
    """
    expansion = Expansion(family, Dims.of(native))
    with uncollected():
        own, problems = expansion.entries(parameter.record for parameter in parameters)
        written = [parameter.record for parameter in parameters if parameter.record.is_writer]
        gathered = collectives.all_gather((_packed(written), problems))
        check_fits({problem for _, rank_problems in gathered for problem in rank_problems})
        records = tuple(_unpacked(packed) for packed, _ in gathered)
        tensors, sources = tile(expansion, records)
        check_fits({line for lines in collectives.all_gather(_contradictions(own, tensors, set())) for line in lines})
    aliases = family.weights.aliases(expansion.dims, tensors)
    return Plan(tuple(own), (), tensors, sources, aliases, family, expansion.dims, records).bound(parameters)


@contextmanager
def uncollected() -> Iterator[None]:
    """Disables garbage collection: a plan creates many objects but no cycles, and searching for them takes as long as planning."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def check_fits(problems: Iterable[str]) -> None:
    """Raises one MappingError with all of `problems`, if there are any."""
    if found := sorted(problems):
        raise MappingError("the model doesn't fit its architecture's rules:\n  " + listed(found))


def tile(
    expansion: Expansion, records: Iterable[Iterable[ParameterRecord]]
) -> tuple[dict[str, TensorSpec], dict[str, tuple[WrittenBox, ...]]]:
    """Returns the tensors that the ranks' records make up, in natural order, and the boxes that tile each. `records` are by rank.

    Proves box by box that every element of every tensor is written exactly once; raises MappingError otherwise.
    """
    specs: dict[str, TensorSpec] = {}
    boxes: dict[str, list[WrittenBox]] = {}
    problems: list[str] = []
    agreed: set[tuple[int, int, torch.dtype]] = set()
    for rank, held in enumerate(records):
        found, unfed = expansion.entries(record for record in held if record.is_writer)
        problems += unfed + _contradictions(found, specs, agreed)
        for entry in found:
            for transfer in entry.transfers if entry.is_writer else ():
                boxes.setdefault(entry.hf[transfer.part], []).append(WrittenBox(rank, entry.record.name, transfer))
    check_fits(set(problems))
    names = sorted(specs, key=natural)
    _check_tiling(specs, boxes)
    return {name: specs[name] for name in names}, {name: tuple(boxes[name]) for name in names}


def _contradictions(
    found: Iterable[PlannedParameter], specs: dict[str, TensorSpec], agreed: set[tuple[int, int, torch.dtype]]
) -> list[str]:
    """Returns a line for each tensor of `found` that `specs` contradicts, and adds the tensors that it lacks.

    `agreed` holds names, shapes and dtypes compared before, by identity: the entries of one expansion share them.
    """
    problems = []
    for entry in found:
        dtype = entry.record.dtype
        if (key := (id(entry.hf), id(entry.shapes), dtype)) in agreed:
            continue
        agreed.add(key)
        for name, shape in zip(entry.hf, entry.shapes, strict=True):
            known = specs.get(name)
            if known is None:
                specs[name] = TensorSpec(shape, dtype)
            elif known.shape != shape or known.dtype != dtype:
                problems.append(
                    f"{entry.record.name} needs {name} as {dtype} {shape}, another rank or parameter as {known.dtype} {known.shape}"
                )
    return problems


def _check_tiling(specs: Mapping[str, TensorSpec], boxes: Mapping[str, Sequence[WrittenBox]]) -> None:
    proven: dict[tuple[object, ...], Flaw | None] = {}  # layers repeat: equal transfers of equal shape are proven once
    problems = []
    for name, spec in specs.items():
        moves = [source.transfer for source in boxes.get(name, ())]
        key = (spec.shape, *map(id, moves))
        if key not in proven:
            proven[key] = flaw(spec.shape, hf_boxes(moves))
        if (found := proven[key]) is not None:
            problems.append(f"{name} {spec.shape}: {found} of the {len(moves)} that ranks write")
    if problems:
        raise MappingError("the ranks' parameters must tile every tensor exactly once:\n  " + listed(problems))


def _packed(records: Iterable[ParameterRecord]) -> bytes:
    """Packs records for sending: a gather takes the largest answer times the number of ranks in memory; names compress well."""
    rows = [
        (record.name, record.shape, record.dtype, tuple(map(astuple, record.cuts)), record.is_writer, record.is_expert)
        for record in records
    ]
    return zlib.compress(pickle.dumps(rows), 1)


def _unpacked(packed: bytes) -> tuple[ParameterRecord, ...]:
    rows = pickle.loads(zlib.decompress(packed))
    known = {cuts: tuple(Cut(*cut) for cut in cuts) for _, _, _, cuts, _, _ in rows}
    return tuple(ParameterRecord(sys.intern(name), shape, dtype, known[cuts], *flags) for name, shape, dtype, cuts, *flags in rows)


def check_source(
    plan: Plan,
    infos: Mapping[str, TensorInfo],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> frozenset[str]:
    """Returns the names in `plan` that the source lacks and that may be missing. Raises a MappingError with all other differences.

    Not collective: it depends on the headers alone, so every rank gets the same answer.
    """
    problems: list[str] = []
    absent: set[str] = set()
    names = list(infos)
    for name, spec in plan.tensors.items():
        info = infos.get(name)
        if info is None and any(fnmatchcase(name, pattern) for pattern in allow_missing):
            absent.add(name)
        elif info is None:
            near = get_close_matches(name, names, n=1, cutoff=0.8) if len(problems) < 20 else []
            problems.append(f"missing: {name} {spec.shape}" + (f"; the nearest name there is {near[0]}" if near else ""))
        elif info.shape != spec.shape:
            hint = " (transposed)" if info.shape == spec.shape[::-1] else ""
            problems.append(f"wrong shape: {name} is {info.shape}{hint}, the config asks for {spec.shape}")
    for name in sorted(infos.keys() - plan.tensors.keys(), key=natural):
        if name in plan.aliases:
            target = plan.tensors[plan.aliases[name]]
            if infos[name].shape != target.shape:
                problems.append(f"wrong shape: {name} is {infos[name].shape}, but must equal {plan.aliases[name]} {target.shape}")
        elif not plan.is_accepted(name) and not any(fnmatchcase(name, pattern) for pattern in allow_unexpected):
            problems.append(f"unexpected: {name} {infos[name].shape}, which no rule of {plan.family.architecture} consumes")
    if problems:
        folder = next(iter(infos.values())).file.parent if infos else "the source"
        kind = checkpoint_kinds.described(names, plan.tensors)
        raise MappingError(
            f"{folder} must hold exactly the tensors of its config. {kind}".rstrip(". ") + ":\n  " + listed(problems)
        )
    return frozenset(absent)
