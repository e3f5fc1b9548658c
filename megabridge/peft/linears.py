"""Linears that can have an adapter, and how each is sharded over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megabridge.models.layers.experts import StackedLinear

from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


@dataclass(frozen=True)
class TensorParallelPlacement:
    """The dimension of a weight that is cut over `group`: its rows (column-parallel), its columns (row-parallel) or none (whole).

    `by_dispatcher`: the ranks of the group get the same tokens, and the token dispatcher sums their outputs and the gradients of
    their inputs, so that the linear itself does not communicate.
    """

    side: Literal["column", "row", "whole"]
    group: Any
    sequence_parallel: bool = False
    by_dispatcher: bool = False

    def is_cut(self, name: str) -> bool:
        """Whether the ranks of the group hold different parts of the adapter's parameter `name`."""
        return self.side == ("row" if name == "lora_A" else "column")

    def parameter(self, name: str, value: Tensor) -> Tensor:
        """Returns the parameter for use in the forward pass; sums the gradient of a replicated one where nothing else does."""
        if self.by_dispatcher and self.side != "whole" and not self.is_cut(name):
            return mappings.copy_to_tensor_model_parallel_region(value, group=self.group)  # type: ignore[no-any-return]
        return value

    def exchange_hidden(self, hidden: Tensor) -> Tensor:
        """Communicates the output of A, [.., r], for B: gathers tokens (column-parallel), or sums over the ranks (row-parallel)."""
        if self.side == "whole" or self.by_dispatcher:
            return hidden
        if self.side == "column" and self.sequence_parallel:
            out = mappings.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.group)
        elif self.side == "column":
            out = mappings.copy_to_tensor_model_parallel_region(hidden, group=self.group)
        elif self.sequence_parallel:
            out = mappings.reduce_scatter_to_sequence_parallel_region(hidden, group=self.group)
        else:
            out = mappings.reduce_from_tensor_model_parallel_region(hidden, group=self.group)
        return out  # type: ignore[no-any-return]

    def gather_output(self, output: Tensor) -> Tensor:
        """Gathers the rows of all ranks of an output [.., rows of this rank]."""
        return mappings.gather_from_tensor_model_parallel_region(output, group=self.group)  # type: ignore[no-any-return]


def placement_of(module: torch.nn.Module) -> TensorParallelPlacement | None:
    """Returns the placement of a linear; None for modules that can't have an adapter. Needs process groups."""
    if isinstance(module, StackedLinear):
        attributes, group = vars(module.weight), parallel_state.get_expert_tensor_parallel_group()
        if not attributes["tensor_model_parallel"]:
            return TensorParallelPlacement("whole", group, by_dispatcher=True)
        return TensorParallelPlacement("column" if attributes["partition_dim"] == 1 else "row", group, by_dispatcher=True)
    if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
        return None
    if module.tp_group.size() == 1:
        return TensorParallelPlacement("whole", module.tp_group)
    side: Literal["column", "row"] = "column" if isinstance(module, ColumnParallelLinear) else "row"
    by_dispatcher = bool(module.explicit_expert_comm)
    return TensorParallelPlacement(side, module.tp_group, bool(module.sequence_parallel) and not by_dispatcher, by_dispatcher)
