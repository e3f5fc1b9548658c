"""Pairs native modules, and their features, with the modules of transformers that compute the same, using the weight rules.

A point is the input or the output of one module of transformers, under the name that its tensors have in the file. The rows of a
linear's weight are its output features and the columns its input features, so the weight's transfers show which of them this rank
has. Norms keep their features in order; a rank has a contiguous range of heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from megabridge.conversion.parameters import canonical_name, unwrap
from megabridge.conversion.plan import LocalItem, Plan
from megabridge.families import Family
from megabridge.mapping import Run
from megabridge.models.layers.norm import HeadsNorm

from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer

Side = Literal["input", "output"]
LOGITS: Final = ""
"""Name of the whole model, whose output is the logits."""
_FUSED: Final[tuple[type, ...]] = (te.TELayerNormColumnParallelLinear,) if te.HAVE_TE else ()
_LINEARS: Final[tuple[type, ...]] = (ColumnParallelLinear, RowParallelLinear, *((te.TELinear,) if te.HAVE_TE else ()), *_FUSED)
_EMBEDDINGS: Final = (VocabParallelEmbedding, torch.nn.Embedding)


@dataclass(frozen=True)
class ParityPoint:
    """The input or output of a module of transformers."""

    module: str
    side: Side


@dataclass(frozen=True, eq=False)
class ModulePair:
    """A point, and the native module whose input or output (or a part of it) holds the same values.

    `ours` and `theirs` index the features; None where all of them are in the same order, in which case fewer features of ours are
    this rank's range of heads. `part` is (number, count) where the features of one native module are those of several modules, one
    after another.
    """

    point: ParityPoint
    native: str
    module: torch.nn.Module
    ours: Tensor | None = None
    theirs: Tensor | None = None
    part: tuple[int, int] = (0, 1)


def layer_prefixes(family: Family) -> tuple[str, str] | None:
    """Returns the name of a layer on the native side and in files, with `{layer}` in it; None if no rule is about layers."""
    mark = "{layer}"
    for rule in family.weights.rules:
        native, hf = rule.native[0], rule.hf[0]
        if mark in native and mark in hf:
            return native[: native.index(mark) + len(mark)], hf[: hf.index(mark) + len(mark)]
    return None


def hf_modules(plan: Plan) -> list[str]:
    """Returns the names of the modules of all tensors, in the order of the tensors."""
    return list(dict.fromkeys(module_of(name) for name in plan.tensors))


def points_of(plan: Plan) -> list[str]:
    """Returns the names of the modules to capture: the layers, and the modules with tensors."""
    prefixes = layer_prefixes(plan.family)
    layers = [] if prefixes is None else [prefixes[1].format(layer=number) for number in range(plan.dims.num_layers)]
    return list(dict.fromkeys([*layers, *hf_modules(plan)]))


def module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def pairs(plan: Plan, chunks: Sequence[torch.nn.Module]) -> list[ModulePair]:
    """Returns the pairs of this rank's modules. Not collective."""
    models = [unwrap(chunk) for chunk in chunks]
    found: list[ModulePair] = []
    for item in plan.items:
        if not item.is_tied_copy and item.local.local.rpartition(".")[2] != "bias":
            path = item.local.local.rpartition(".")[0]
            found += _of_parameter(item, models[item.local.chunk].get_submodule(path))
    for model in models:
        found += _of_layers(plan.family, model)
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True) and model is models[-1]:
            found.append(_of_logits(model))
    return found


def _of_parameter(item: LocalItem, module: torch.nn.Module) -> Iterator[ModulePair]:
    native, leaf = module_of(item.record.name), item.record.name.rpartition(".")[2]
    modules = [module_of(name) for name in item.hf]
    if isinstance(module, _FUSED) and leaf.startswith("layer_norm"):
        yield ModulePair(ParityPoint(modules[0], "input"), native, module)
    elif isinstance(module, _LINEARS):
        sides: tuple[tuple[Side, int], ...] = (("output", 0),) if isinstance(module, _FUSED) else (("input", 1), ("output", 0))
        for part, name in enumerate(modules):
            for side, dim in sides:
                ours, theirs = _features(item, part, dim)
                yield ModulePair(ParityPoint(name, side), native, module, ours, theirs)
    elif isinstance(module, _EMBEDDINGS):
        yield ModulePair(ParityPoint(modules[0], "output"), native, module)
    elif isinstance(module, TopKRouter):
        return  # the output of a router has another form on each side
    elif len(item.record.shape) == 1 or isinstance(module, HeadsNorm):
        for part, name in enumerate(modules):
            for side in ("input", "output"):
                yield ModulePair(ParityPoint(name, side), native, module, part=(part, len(modules)))


def _features(item: LocalItem, part: int, dim: int) -> tuple[Tensor, Tensor]:
    """Returns the features along dimension `dim` of a linear's weight that this rank shares with part number `part`.

    They are indexed in the local weight and in the part.
    """
    found = {
        (axis.native, axis.hf)
        for transfer in item.transfers
        if transfer.part == part
        for axis in transfer.axes
        if axis.native_dim == dim
    }
    if not found:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    ours, theirs = zip(*found, strict=True)
    return torch.cat([_indices(run) for run in ours]), torch.cat([_indices(run) for run in theirs])


def _indices(run: Run) -> Tensor:
    return (run.start + torch.arange(run.count)[:, None] * run.stride + torch.arange(run.block)[None]).flatten()


def _of_layers(family: Family, model: torch.nn.Module) -> Iterator[ModulePair]:
    prefixes = layer_prefixes(family)
    layers = {name: module.layer_number - 1 for name, module in model.named_modules() if isinstance(module, TransformerLayer)}
    for local, number in layers.items():
        native = canonical_name(local, layers)
        if prefixes is not None and native == prefixes[0].format(layer=number):
            for side in ("input", "output"):
                yield ModulePair(ParityPoint(prefixes[1].format(layer=number), side), native, model.get_submodule(local))


def _of_logits(model: Any) -> ModulePair:
    size, index = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    share = model.vocab_size // size
    real = model.real_columns(share)
    return ModulePair(ParityPoint(LOGITS, "output"), "logits", model, torch.arange(real), torch.arange(real) + index * share)
