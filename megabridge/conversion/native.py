"""Live parameters: what megatron-core's modules say about themselves, as records that the plan understands.

The cut comes from the parameter (`partition_dim`, `partition_stride`), the layer number from its layer; nothing is restated per
architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

import megabridge.platform  # noqa: F401  first: it lets megatron-core run where there is no CUDA
from megabridge.errors import MappingError
from megabridge.mapping import Cut

from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer


@dataclass(frozen=True, slots=True)
class Record:
    """What a rank says of one parameter: all that the plans of other ranks need, without its elements.

    `name` is canonical (global layer numbers), `shape` the global one. `is_writer` says that this rank, of all that hold the same
    elements, writes them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: Cut | None
    is_writer: bool


@dataclass(frozen=True, eq=False)
class Live:
    """One parameter of this rank; `local` is its name inside chunk number `chunk`."""

    record: Record
    local: str
    chunk: int
    parameter: torch.nn.Parameter

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def data(self) -> torch.Tensor:
        """The elements now: distributed optimizers replace a parameter's storage."""
        return self.parameter.data


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The model inside wrappers for data parallelism and mixed precision (each holds the next as `module`)."""
    while isinstance(inner := chunk._modules.get("module"), torch.nn.Module):
        chunk = inner
    return chunk


def survey(chunks: Sequence[torch.nn.Module]) -> tuple[Live, ...]:
    """The parameters of this rank's model chunks, in module order. Every rank may call it; nothing is exchanged."""
    out: list[Live] = []
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        layers = {name: module.layer_number - 1 for name, module in model.named_modules() if isinstance(module, TransformerLayer)}
        for local, parameter in model.named_parameters():
            out.append(_live(canonical(local, layers), local, number, parameter))
    return tuple(out)


def canonical(local: str, layers: dict[str, int]) -> str:
    """`local` with its layer's global number; `layers` maps module names of layers to those numbers."""
    parts = local.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in layers:
            return ".".join((*parts[: end - 1], str(layers[prefix]), *parts[end:]))
    return local


def _live(name: str, local: str, chunk: int, parameter: torch.nn.Parameter) -> Live:
    shape = tuple(parameter.shape)
    size, index = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    is_cut = bool(vars(parameter).get("tensor_model_parallel", False)) and size > 1
    is_writer = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    if not is_cut:
        return Live(Record(name, shape, parameter.dtype, None, is_writer and index == 0), local, chunk, parameter)
    attributes = vars(parameter)
    cut = Cut(attributes["partition_dim"], attributes["partition_stride"], size, index)
    if not 0 <= cut.dim < len(shape) or shape[cut.dim] % cut.stride:
        raise MappingError(
            f"{name} of local shape {shape} can't be cut along dimension {cut.dim} with stride {cut.stride}; "
            "its module sets wrong tensor-parallel attributes."
        )
    whole = tuple(length * size if dim == cut.dim else length for dim, length in enumerate(shape))
    assert prod(whole) == prod(shape) * size
    return Live(Record(name, whole, parameter.dtype, cut, is_writer), local, chunk, parameter)
