"""Putting adapters into a model's chunks: everything else is frozen, and only they are stored in a native checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megabridge import agreement
from megabridge.checkpoint.hf import native_box, view
from megabridge.conversion.native import Live, survey, unwrap
from megabridge.conversion.plan import Entry, Expansion
from megabridge.errors import ConfigError, listed
from megabridge.families import Family
from megabridge.mapping import Dims
from megabridge.peft.adapter import Adapter, Rows
from megabridge.peft.linears import Spread, spread_of
from megabridge.peft.lora import LoRA, ends, is_named
from megabridge.peft.rules import AdapterMap, Target
from megabridge.peft.state import stored


def adapted(family: Family, lora: LoRA) -> Family:
    """The family whose tensors are the adapters that `lora` gives to a model of `family`."""
    return replace(family, weights=AdapterMap(family.weights, lora), ignored=(), carried=())


def attach(chunks: Sequence[Any], family: Family, native: Mapping[str, object], lora: LoRA, *, seed: int) -> None:
    """Gives every targeted linear of this rank's bare chunks an adapter, and freezes all other parameters. Every rank calls it.

    `native` is the model's native config. B is zero, A as PEFT begins it (uniform up to 1 / sqrt(in)), from `seed` and the linear's
    name, whatever the layout. With DoRA the weights must be loaded before: the lengths begin as theirs. Raises the same ConfigError
    on every rank when a pattern names no linear.
    """
    dims, rules = Dims.of(native), AdapterMap(family.weights, lora)
    with agreement.together("adapting the model"):
        if survey(chunks, adapters=True):
            raise ConfigError("the model has adapters already; merge them into an export, and adapt that.")
        linears = [live for live, _, _ in _linears(chunks)]
        for live in linears:
            rules.target(live.name, dims)  # whose rules hold before anything is changed
    if not any(agreement.gather(bool(linears))):
        raise ConfigError(
            "adapters know the linears of backend=torch and local, and this model has none of them; set backend=torch."
        )
    names = {name for live in linears for name in _modules(rules, live, dims)}
    _check_named(lora, {name for rank_names in agreement.gather(names) for name in rank_names})
    made = put(chunks, family, native, lora)
    _initialize(chunks, adapted(family, lora), dims, seed)
    for adapter in made:
        adapter.begin()


def put(chunks: Sequence[Any], family: Family, native: Mapping[str, object], lora: LoRA) -> list[Adapter]:
    """Freezes the bare chunks and gives them the adapters, whose values are zero. Nothing is exchanged, nothing is checked."""
    dims, rules = Dims.of(native), AdapterMap(family.weights, lora)
    expansion = Expansion(family, dims)
    linears = _linears(chunks)
    for chunk in chunks:
        _freeze(chunk)
    made = []
    for live, module, spread in linears:
        if (target := rules.target(live.name, dims)) is not None:
            made.append(Adapter(module, spread, rows_of(expansion.entry(live.record), live, target), lora))
    for chunk in chunks:
        chunk.stored = partial(stored, chunk)
        chunk.keep_recomputation_alive()
    return made


def _linears(chunks: Sequence[Any]) -> list[tuple[Live, Any, Spread]]:
    """Weight, module and place of every linear that can be adapted, in module order."""
    lives = [live for live in survey(chunks) if live.local.endswith(".weight")]
    owners = [(live, unwrap(chunks[live.chunk]).get_submodule(live.local.rpartition(".")[0])) for live in lives]
    return [(live, module, spread) for live, module in owners if (spread := spread_of(module)) is not None]


def _modules(rules: AdapterMap, live: Live, dims: Dims) -> list[str]:
    """The Hugging Face linears behind a weight, those of all experts."""
    experts = range(dims.num_moe_experts or 1)
    templates = rules.linears(live.name, dims)
    return [name.format(row=row) for name in templates for row in (experts if "{row}" in name else (0,))]


def _check_named(lora: LoRA, names: Collection[str]) -> None:
    """Raises ConfigError for patterns that fit none of the linears `names`."""
    known = {end for name in names for end in ends(name)}
    patterns = (*(() if lora.takes_all else lora.target_modules), *lora.exclude_modules)
    wrong = [one for one in patterns if one not in known and not ("*" in one and any(is_named(name, (one,)) for name in names))]
    found = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    if wrong:
        lines = listed([f"{one!r} is the end of no linear's name" for one in wrong])
        raise ConfigError(f"target_modules and exclude_modules must name linears of this model ({found}):\n  {lines}")
    if not any(lora.is_target(name) for name in names):
        raise ConfigError(f"exclude_modules={list(lora.exclude_modules)} leaves no linear of {found}; name fewer.")


def _freeze(chunk: torch.nn.Module) -> None:
    for parameter in chunk.parameters():
        parameter.requires_grad = False
    for module in chunk.modules():
        if "expert_bias" in module._buffers:
            module.frozen_expert_bias = True  # type: ignore[assignment]  # megatron-core moves it after each step otherwise


def rows_of(entry: Entry, live: Live, target: Target) -> Rows:
    """Which local rows of the weight of `entry` each adapted linear has."""
    weight = live.parameter
    dim = weight.dim() - 2
    part_of_row = torch.full((weight.shape[dim],), -1)
    for transfer in entry.transfers:
        rows = next(axis.native for axis in transfer.axes if axis.native_dim == dim)
        for block in range(rows.count):
            start = rows.start + block * rows.stride
            part_of_row[start : start + rows.block] = transfer.part % target.count
    return Rows.of(part_of_row, target.parts)


@torch.no_grad()
def _initialize(chunks: Sequence[Any], family: Family, dims: Dims, seed: int) -> None:
    expansion = Expansion(family, dims)
    for live in survey(chunks, adapters=True):
        if not live.local.endswith(".lora_A") or live.parameter.is_meta:
            continue
        entry = expansion.entry(live.record)
        for transfer in entry.transfers:
            whole = _first_values(entry.hf[transfer.part], transfer.hf_shape, seed)
            native_box(live.parameter, transfer).copy_(view(whole, transfer.hf_view()))


def _first_values(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    bound = 1 / math.sqrt(shape[-1])  # torch.nn.Linear's own, which PEFT takes
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
