"""Attaches adapters to a model's chunks: all other parameters are frozen, and native checkpoints store adapters only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from megabridge.conversion.parameters import LocalParameter, collect_parameters, unwrap
from megabridge.conversion.plan import Expansion, PlannedParameter
from megabridge.errors import ConfigError, listed
from megabridge.families import Family
from megabridge.mapping import Dims
from megabridge.models.backends.registry import adapter_backends
from megabridge.parallel import collectives
from megabridge.peft import initial_values
from megabridge.peft.adapter import AdaptedRows, Adapter
from megabridge.peft.linears import TensorParallelPlacement, placement_of
from megabridge.peft.lora_config import LoRA, ends, is_named
from megabridge.peft.rules import AdapterMap, AdapterTarget
from megabridge.peft.state import sharded_state


def adapted(family: Family, lora: LoRA) -> Family:
    """Returns a family whose tensors are the adapters that `lora` gives to a model of `family`."""
    return replace(family, weights=AdapterMap(family, lora), ignored=(), passthrough=())


def attach(chunks: Sequence[Any], family: Family, native: Mapping[str, object], lora: LoRA, *, seed: int) -> None:
    """Adds an adapter to every targeted weight of this rank's bare chunks, and freezes all other parameters. Every rank calls it.

    `native` is the model's native config. B is initialised with zeros and A as in PEFT (megabridge/peft/initial_values.py). With
    DoRA the weights must be loaded before: magnitudes are initialised with their norms. Raises the same ConfigError on every rank
    when a pattern matches nothing.
    """
    with collectives.raise_together("adapting the model"):
        if collect_parameters(chunks, adapters=True):
            raise ConfigError("the model has adapters already; merge them into an export, and adapt that.")
        here = names(chunks, family, native, lora)  # raises before anything is changed
    check(lora, collectives.all_gather(here))
    made = inject(chunks, family, native, lora)
    initial_values.fill(chunks, adapted(family, lora), Dims.of(native), seed)
    for adapter in made:
        adapter.initialize_magnitude()


@dataclass(frozen=True)
class Names:
    """Names in transformers' model of the weights of a rank that may have adapters."""

    linears: frozenset[str]
    parameters: frozenset[str]


def names(chunks: Sequence[Any], family: Family, native: Mapping[str, object], lora: LoRA) -> Names:
    """Returns the names for bare chunks, of all experts. No communication. Raises ConfigError where `lora` can't be applied."""
    dims, rules = Dims.of(native), AdapterMap(family, lora)
    weights = [live.name for live, _, _ in _linears(chunks)]
    for weight in weights:
        rules.target(weight, dims)
    linears = (name for weight in weights for name in _modules(rules, weight, dims))
    return Names(frozenset(linears), frozenset(filter(None, (rules.parameter(weight, dims) for weight in weights))))


def check(lora: LoRA, everywhere: Iterable[Names]) -> None:
    """Raises ConfigError for patterns that match nothing in the whole model; `everywhere` has the names of all ranks."""
    found = list(everywhere)
    linears, parameters = {name for one in found for name in one.linears}, {name for one in found for name in one.parameters}
    if not linears | parameters:
        raise ConfigError(
            f"adapters need linears of backend={adapter_backends()}, but this model has none of them; set backend so."
        )
    problems = []
    modules = (*(() if lora.takes_all else lora.target_modules), *lora.exclude_modules)
    if wrong := _fitting_none(modules, linears):
        lines = listed([_described(one, "linear", parameters, "target_parameters") for one in wrong])
        problems.append(f"target_modules and exclude_modules must name linears of this model ({_last(linears)}):\n  {lines}")
    if wrong := _fitting_none(lora.target_parameters, parameters):
        lines = listed([_described(one, "parameter", linears, "target_modules") for one in wrong])
        known = _last(parameters) or "this model has none"
        problems.append(f"target_parameters must name experts' weights that are one 3-D parameter of a layer ({known}):\n  {lines}")
    if problems:
        raise ConfigError("\n".join(problems))
    if lora.target_modules and not any(lora.is_target(name) for name in linears):
        raise ConfigError(f"exclude_modules={list(lora.exclude_modules)} leaves no linear of {_last(linears)}; name fewer.")


def _fitting_none(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    known = {end for name in names for end in ends(name)}
    return [one for one in patterns if one not in known and not ("*" in one and any(is_named(name, (one,)) for name in names))]


def _described(pattern: str, kind: str, others: Collection[str], key: str) -> str:
    line = f"{pattern!r} matches the end of no {kind}'s name"
    return line if _fitting_none((pattern,), others) else f"{line}; name it in {key}"


def _last(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def inject(chunks: Sequence[Any], family: Family, native: Mapping[str, object], lora: LoRA) -> list[Adapter]:
    """Freezes the bare chunks and adds the adapters, filled with zeros. No communication and no checks."""
    dims, rules = Dims.of(native), AdapterMap(family, lora)
    expansion = Expansion(family, dims)
    linears = _linears(chunks)
    for chunk in chunks:
        _freeze(chunk)
    made = []
    for live, module, placement in linears:
        if (target := rules.target(live.name, dims)) is not None:
            made.append(Adapter(module, placement, rows_of(expansion.entry(live.record), live, target), lora))
    for chunk in chunks:
        chunk.own_sharded_state = partial(sharded_state, chunk)
        chunk.enable_input_require_grads()
    return made


def _linears(chunks: Sequence[Any]) -> list[tuple[LocalParameter, Any, TensorParallelPlacement]]:
    """(weight, module, placement) of every linear that can have an adapter, in module order."""
    lives = [live for live in collect_parameters(chunks) if live.local.endswith(".weight")]
    owners = [(live, unwrap(chunks[live.chunk]).get_submodule(live.local.rpartition(".")[0])) for live in lives]
    return [(live, module, placement) for live, module in owners if (placement := placement_of(module)) is not None]


def _modules(rules: AdapterMap, weight: str, dims: Dims) -> list[str]:
    """Names of the Hugging Face linears that make up a weight, of all experts."""
    experts = range(dims.num_moe_experts or 1)
    templates = rules.linears(weight, dims)
    return [name.format(row=row) for name in templates for row in (experts if "{row}" in name else (0,))]


def _freeze(chunk: torch.nn.Module) -> None:
    for parameter in chunk.parameters():
        parameter.requires_grad = False
    for module in chunk.modules():
        if "expert_bias" in module._buffers:
            module.frozen_expert_bias = True  # type: ignore[assignment]  # megatron-core updates it after each step otherwise


def rows_of(entry: PlannedParameter, live: LocalParameter, target: AdapterTarget) -> AdaptedRows:
    """Returns which local rows of the weight of `entry` belong to each adapted linear."""
    weight = live.parameter
    dim = weight.dim() - 2
    part_of_row = torch.full((weight.shape[dim],), -1)
    for transfer in entry.transfers:
        rows = next(axis.native for axis in transfer.axes if axis.native_dim == dim)
        for block in range(rows.count):
            start = rows.start + block * rows.stride
            part_of_row[start : start + rows.block] = transfer.part % target.count
    return AdaptedRows.of(part_of_row, target.parts)
