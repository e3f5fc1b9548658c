"""The plan: every transfer between this rank's parameters and the Hugging Face tensors, made once from the live model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod

import torch

from megabridge import agreement
from megabridge.checkpoint.safetensors import TensorInfo
from megabridge.conversion.native import Live
from megabridge.errors import MappingError, listed
from megabridge.families import Family
from megabridge.mapping import Dims, Transfer, natural, transfers


@dataclass(frozen=True, slots=True)
class Item:
    """One parameter and the transfers that fill it; `hf` names the tensors that the transfers' part numbers stand for."""

    live: Live
    hf: tuple[str, ...]
    transfers: tuple[Transfer, ...]
    is_tied_copy: bool

    @property
    def is_writer(self) -> bool:
        return self.live.is_writer and not self.is_tied_copy


@dataclass(frozen=True, slots=True)
class Spec:
    """A Hugging Face tensor as the model determines it: whole shape, and the dtype of the parameter behind it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Plan:
    """This rank's items, and all ranks' tensors in natural order. `aliases` maps tensors that a tied checkpoint may carry
    besides to the tensors they equal."""

    items: tuple[Item, ...]
    tensors: Mapping[str, Spec]
    aliases: Mapping[str, str]
    family: Family

    @property
    def owned_bytes(self) -> int:
        """Bytes of this rank's parameters that some tensor feeds."""
        return sum(t.elements * item.live.parameter.element_size() for item in self.items for t in item.transfers)


def make_plan(family: Family, native: Mapping[str, object], lives: Sequence[Live]) -> Plan:
    """The plan for this rank's parameters. Collective: ranks exchange names and shapes once.

    Raises the same MappingError on every rank, with every parameter that no rule feeds and every contradiction between shapes.
    """
    dims = Dims.of(native)
    items: list[Item] = []
    shapes: list[tuple[str, tuple[int, ...], torch.dtype, str]] = []
    problems: list[str] = []
    for live in lives:
        rule = family.weights.resolve(live.name, tied=dims.tied)
        if rule is None:
            problems.append(f"no rule of {family.architecture} feeds the parameter {live.name} {live.global_shape}")
            continue
        try:
            moves = transfers(rule.layout, live.global_shape, dims, live.cut)
            whole = rule.layout.part_shapes(live.global_shape, dims)
        except MappingError as error:
            problems.append(f"{live.name}: {error}")
            continue
        items.append(Item(live, rule.hf, moves, rule.is_tied_copy))
        shapes += [(name, shape, live.parameter.dtype, live.name) for name, shape in zip(rule.hf, whole, strict=True)]
    tensors = _merge(agreement.gather((shapes, problems)))
    _check_tiling(items, tensors)
    aliases = family.weights.tied_aliases() if dims.tied else {}
    return Plan(tuple(items), tensors, {name: to for name, to in aliases.items() if to in tensors}, family)


Found = tuple[list[tuple[str, tuple[int, ...], torch.dtype, str]], list[str]]


def _merge(found: list[Found]) -> dict[str, Spec]:
    specs: dict[str, Spec] = {}
    problems = sorted({problem for _, rank_problems in found for problem in rank_problems})
    for name, shape, dtype, native in (entry for shapes, _ in found for entry in shapes):
        known = specs.setdefault(name, Spec(shape, dtype))
        if known != Spec(shape, dtype):
            problems.append(f"{native} wants {name} as {dtype} {shape}, another rank or parameter as {known.dtype} {known.shape}")
    if problems:
        raise MappingError("the model doesn't fit its architecture's rules:\n  " + listed(problems))
    return {name: specs[name] for name in sorted(specs, key=natural)}


def _check_tiling(items: list[Item], tensors: Mapping[str, Spec]) -> None:
    """Raises MappingError unless the boxes that ranks write have exactly as many elements as the tensors."""
    own: Counter[str] = Counter()
    for item in items:
        if item.is_writer:
            for transfer in item.transfers:
                own[item.hf[transfer.part]] += transfer.elements
    written: Counter[str] = Counter()
    for counts in agreement.gather(own):
        written.update(counts)
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
