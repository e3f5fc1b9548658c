"""The plan: every transfer between the ranks' parameters and the Hugging Face tensors, made once from the live model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

import torch

from megabridge import agreement
from megabridge.checkpoint.safetensors import TensorInfo
from megabridge.conversion.native import Live, Record
from megabridge.errors import MappingError, listed
from megabridge.families import Family
from megabridge.mapping import Dims, Transfer, natural, transfers


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter of any rank and the transfers that fill it.

    `hf` names the tensors that the transfers' part numbers stand for, `shapes` are these tensors' whole shapes.
    """

    record: Record
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transfers: tuple[Transfer, ...]
    is_tied_copy: bool

    @property
    def is_writer(self) -> bool:
        return self.record.is_writer and not self.is_tied_copy


@dataclass(frozen=True, slots=True)
class Item(Entry):
    """An entry whose parameter lives on this rank."""

    live: Live


@dataclass(frozen=True, slots=True)
class Spec:
    """A Hugging Face tensor as the model determines it: whole shape, and the dtype of the parameter behind it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Source:
    """A box of a tensor, the rank that writes it, and that rank's parameter (canonical name) that holds it."""

    rank: int
    native: str
    transfer: Transfer


@dataclass(frozen=True)
class Plan:
    """This rank's items, and all ranks' tensors in natural order.

    `aliases` maps tensors that a tied checkpoint may carry besides to the tensors they equal. `records` holds every rank's
    parameters, by rank.
    """

    items: tuple[Item, ...]
    tensors: Mapping[str, Spec]
    aliases: Mapping[str, str]
    family: Family
    dims: Dims
    records: tuple[tuple[Record, ...], ...]

    @property
    def owned_bytes(self) -> int:
        """Bytes of this rank's parameters that some tensor feeds."""
        return sum(t.elements * item.live.parameter.element_size() for item in self.items for t in item.transfers)

    @cached_property
    def sources(self) -> Mapping[str, tuple[Source, ...]]:
        """By tensor, the boxes that tile it: by rank, then in module order. Equal on every rank."""
        found: dict[str, list[Source]] = {name: [] for name in self.tensors}
        for rank, records in enumerate(self.records):
            for entry in entries(self.family, self.dims, [record for record in records if record.is_writer])[0]:
                for transfer in entry.transfers if entry.is_writer else ():
                    found[entry.hf[transfer.part]].append(Source(rank, entry.record.name, transfer))
        return {name: tuple(boxes) for name, boxes in found.items()}


def entries(family: Family, dims: Dims, records: Iterable[Record]) -> tuple[list[Entry], list[str]]:
    """What the family's rules say of `records`, and a line for each that no rule feeds or whose shape contradicts its rule."""
    out: list[Entry] = []
    problems: list[str] = []
    for record in records:
        rule = family.weights.resolve(record.name, tied=dims.tied)
        if rule is None:
            problems.append(f"no rule of {family.architecture} feeds the parameter {record.name} {record.shape}")
            continue
        try:
            moves = transfers(rule.layout, record.shape, dims, record.cut)
            whole = rule.layout.part_shapes(record.shape, dims)
        except MappingError as error:
            problems.append(f"{record.name}: {error}")
            continue
        out.append(Entry(record, rule.names(len(whole)), tuple(whole), moves, rule.is_tied_copy))
    return out, problems


def make_plan(family: Family, native: Mapping[str, object], lives: Sequence[Live]) -> Plan:
    """The plan for this rank's parameters. Collective: ranks exchange names and shapes once.

    Raises the same MappingError on every rank, with every parameter that no rule feeds and every contradiction between shapes.
    """
    dims = Dims.of(native)
    own, problems = entries(family, dims, [live.record for live in lives])
    by_name = {live.name: live for live in lives}
    items = tuple(
        Item(entry.record, entry.hf, entry.shapes, entry.transfers, entry.is_tied_copy, by_name[entry.record.name]) for entry in own
    )
    tensors = _merge(agreement.gather((_shapes(own), problems)))
    _check_tiling(own, tensors)
    aliases = family.weights.tied_aliases() if dims.tied else {}
    records = agreement.gather(tuple(live.record for live in lives))
    return Plan(items, tensors, {name: to for name, to in aliases.items() if to in tensors}, family, dims, tuple(records))


Shapes = list[tuple[str, tuple[int, ...], torch.dtype, str]]


def _shapes(found: Iterable[Entry]) -> Shapes:
    return [
        (name, shape, entry.record.dtype, entry.record.name)
        for entry in found
        for name, shape in zip(entry.hf, entry.shapes, strict=True)
    ]


def _merge(found: list[tuple[Shapes, list[str]]]) -> dict[str, Spec]:
    specs: dict[str, Spec] = {}
    problems = sorted({problem for _, rank_problems in found for problem in rank_problems})
    for name, shape, dtype, native in (entry for shapes, _ in found for entry in shapes):
        known = specs.setdefault(name, Spec(shape, dtype))
        if known != Spec(shape, dtype):
            problems.append(f"{native} wants {name} as {dtype} {shape}, another rank or parameter as {known.dtype} {known.shape}")
    if problems:
        raise MappingError("the model doesn't fit its architecture's rules:\n  " + listed(problems))
    return {name: specs[name] for name in sorted(specs, key=natural)}


def _check_tiling(own: Iterable[Entry], tensors: Mapping[str, Spec]) -> None:
    """Raises MappingError unless the boxes that ranks write have exactly as many elements as the tensors."""
    counts: Counter[str] = Counter()
    for entry in own:
        if entry.is_writer:
            for transfer in entry.transfers:
                counts[entry.hf[transfer.part]] += transfer.elements
    written: Counter[str] = Counter()
    for theirs in agreement.gather(counts):
        written.update(theirs)
    problems = [
        f"{name}: ranks write {written[name]} elements of {prod(spec.shape)}"
        for name, spec in tensors.items()
        if written[name] != prod(spec.shape)
    ]
    if problems:
        raise MappingError("the ranks' parameters must tile every tensor exactly once:\n  " + listed(problems))


def check_source(
    plan: Plan,
    infos: Mapping[str, TensorInfo],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> frozenset[str]:
    """The names in `plan` that the source lacks and that may be missing. Raises one MappingError with every other difference.

    A rank needs only the headers for it, so that every rank comes to the same answer.
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
        elif not plan.family.is_ignored(name) and not any(fnmatchcase(name, pattern) for pattern in allow_unexpected):
            problems.append(f"unexpected: {name} {infos[name].shape}, which no rule of {plan.family.architecture} consumes")
    if problems:
        folder = next(iter(infos.values())).file.parent if infos else "the source"
        raise MappingError(f"{folder} must hold exactly the tensors of its config:\n  " + listed(problems))
    return frozenset(absent)
