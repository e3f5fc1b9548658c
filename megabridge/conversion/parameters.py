"""Local parameters and their records: name, shape and cut, as megatron-core's modules describe them.

The cut comes from the parameter (`partition_dim`, `partition_stride`), the layer number from its layer, the expert from its
MoELayer; nothing is restated per architecture. All experts of a layer count as one parameter, [experts, ...], of which each backend
holds rows in its own way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import torch

import megabridge.platform as platform
from megabridge.errors import MappingError
from megabridge.mapping import Cut

platform.prepare()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.moe.moe_layer import BaseMoELayer  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402

# Names of one expert's parameter in SequentialMLP and TEGroupedMLP, below `experts.`.
_ONE_EXPERT: Final = (re.compile(r"local_experts\.(\d+)\.(.+)"), re.compile(r"(?=.*\.(?:weight|bias)(\d+)$)(.+?)\d+$"))

ADAPTER: Final = ".adapter."
"""Part of the name of every parameter that an adapter adds to a linear (megabridge.peft)."""


@dataclass(frozen=True, slots=True)
class ParameterRecord:
    """Describes one parameter of a rank without its elements: all that the plans of other ranks need.

    `name` is canonical (global layer and expert numbers), `shape` is global. `is_writer`: of the ranks that hold the same elements,
    this one writes them. `is_expert`: the parameter is distributed over the experts' groups. `is_copy`: a parameter of another
    stage holds the same elements (the embedding that multi-token prediction needs on the last stage).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cuts: tuple[Cut, ...]
    is_writer: bool
    is_expert: bool = False
    is_copy: bool = False


@dataclass(frozen=True, eq=False)
class LocalParameter:
    """A parameter or persistent buffer of this rank; `local` is its name inside chunk number `chunk`."""

    record: ParameterRecord
    local: str
    chunk: int
    parameter: torch.Tensor

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def data(self) -> torch.Tensor:
        """The current elements: distributed optimizers replace a parameter's storage."""
        return self.parameter.data


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """Returns the model inside wrappers for data parallelism and mixed precision (each holds the next as `module`)."""
    while isinstance(inner := chunk._modules.get("module"), torch.nn.Module):
        chunk = inner
    return chunk


def collect_parameters(chunks: Sequence[torch.nn.Module], *, adapters: bool = False) -> tuple[LocalParameter, ...]:
    """Returns this rank's parameters and correction biases of routers, in module order; with `adapters`, only the adapters'.

    Not collective.
    """
    out: list[LocalParameter] = []
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        modules = dict(model.named_modules())
        layers = {name: module.layer_number - 1 for name, module in modules.items() if isinstance(module, TransformerLayer)}
        experts = {f"{name}.experts.": module for name, module in modules.items() if isinstance(module, BaseMoELayer)}
        for local, parameter in _tensors(model):
            if (ADAPTER in local) != adapters:
                continue
            prefix = next((prefix for prefix in experts if local.startswith(prefix)), None)
            name = canonical_name(local, layers)
            if prefix is None:
                is_copy = local.startswith("embedding.") and not model.pre_process
                record = _record(name, parameter, is_copy=is_copy)
            else:
                below = local.removeprefix(prefix)
                record = _expert_record(name.removesuffix(below), below, parameter, experts[prefix])
            out.append(LocalParameter(record, local, number, parameter))
    return tuple(out)


def _tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Returns parameters and the only buffer that is a weight: `router.expert_bias`, updated by aux-loss-free balancing."""
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(".router.expert_bias")]
    return [*model.named_parameters(), *buffers]


def canonical_name(local: str, layers: dict[str, int]) -> str:
    """Returns `local` with its layer's global number; `layers` maps module names of layers to those numbers."""
    parts = local.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in layers and parts[end - 1].isdigit():
            return ".".join((*parts[: end - 1], str(layers[prefix]), *parts[end:]))
    return local


def _record(name: str, parameter: torch.Tensor, *, is_copy: bool) -> ParameterRecord:
    size, index = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    is_first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0 and not is_copy
    cut = _cut(name, parameter, size, index)
    shape = tuple(parameter.shape)
    if cut is None:
        return ParameterRecord(name, shape, parameter.dtype, (), is_first and index == 0, is_copy=is_copy)
    return ParameterRecord(name, _whole(shape, cut), parameter.dtype, (cut,), is_first, is_copy=is_copy)


def _expert_record(prefix: str, local: str, parameter: torch.Tensor, layer: BaseMoELayer) -> ParameterRecord:
    """Returns the record of `local` in a layer's experts (`prefix`, canonical): the rows of all local experts, or of one."""
    size, index = parallel_state.get_expert_tensor_parallel_world_size(), parallel_state.get_expert_tensor_parallel_rank()
    found = next((match for pattern in _ONE_EXPERT if (match := pattern.fullmatch(local))), None)
    name = local if found is None else found[2]
    cut = _cut(prefix + name, parameter, size, index)
    if cut is not None and layer.config.gated_linear_unit and name.startswith("linear_fc1."):
        cut = Cut(cut.dim, 2, size, index)  # Transformer Engine sets a stride of 1, but holds [gate; up] too
    shape = tuple(parameter.shape) if cut is None else _whole(tuple(parameter.shape), cut)
    count, total = layer.num_local_experts, layer.config.num_moe_experts
    if found is None:
        if shape[0] != count:
            raise MappingError(f"{prefix}{name} {shape} must have a row for each of this rank's {count} experts.")
        rows, shape = Cut(0, 1, total // count, layer.local_expert_indices[0] // count), (total, *shape[1:])
    else:
        expert = layer.local_expert_indices[int(found[1])]
        rows, shape, name = Cut(0, 1, total, expert, drops=True), (total, *shape), f"{expert}.{name}"
        cut = None if cut is None else Cut(cut.dim + 1, cut.stride, size, index)
    is_first = parallel_state.get_expert_data_parallel_rank() == 0
    cuts = (rows,) if cut is None else (rows, cut)
    return ParameterRecord(
        prefix + name, shape, parameter.dtype, cuts, is_first and (cut is not None or index == 0), is_expert=True
    )


def _cut(name: str, parameter: torch.Tensor, size: int, index: int) -> Cut | None:
    """Returns how the parameter is cut over a group of `size` ranks, of which this is number `index`; None if it isn't cut."""
    attributes, shape = vars(parameter), tuple(parameter.shape)
    if size == 1 or not attributes.get("tensor_model_parallel", False):
        return None
    cut = Cut(attributes["partition_dim"], attributes["partition_stride"], size, index)
    if not 0 <= cut.dim < len(shape) or shape[cut.dim] % cut.stride:
        raise MappingError(
            f"{name} of local shape {shape} can't be cut along dimension {cut.dim} with stride {cut.stride}; "
            "its module sets wrong tensor-parallel attributes."
        )
    return cut


def _whole(shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    whole = tuple(length * cut.size if dim == cut.dim else length for dim, length in enumerate(shape))
    assert prod(whole) == prod(shape) * cut.size
    return whole
