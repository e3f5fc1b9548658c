"""Linears that can have an adapter, and how each is spread over ranks."""

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
    """Which side of the weight is cut over `group`: its rows (column), its columns (row), or none (whole).

    `by_dispatcher`: the ranks of the group get the same tokens, and the token dispatcher adds up what they return and the gradients
    of what they got, so that the linear itself exchanges nothing.
    """

    side: Literal["column", "row", "whole"]
    group: Any
    sequence_parallel: bool = False
    by_dispatcher: bool = False

    def is_cut(self, name: str) -> bool:
        """Whether ranks of the group have different parts of the adapter's parameter `name`."""
        return self.side == ("row" if name == "lora_A" else "column")

    def parameter(self, name: str, value: Tensor) -> Tensor:
        """The parameter as it is used: the gradient of one held whole is summed here where nothing else does it."""
        if self.by_dispatcher and self.side != "whole" and not self.is_cut(name):
            return mappings.copy_to_tensor_model_parallel_region(value, group=self.group)  # type: ignore[no-any-return]
        return value

    def between(self, hidden: Tensor) -> Tensor:
        """What A gives, [.., r], as B takes it: of all tokens for the rows here, or summed over the columns' shares."""
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

    def gathered(self, output: Tensor) -> Tensor:
        """All ranks' rows of an output, [.., rows here]."""
        return mappings.gather_from_tensor_model_parallel_region(output, group=self.group)  # type: ignore[no-any-return]


def placement_of(module: torch.nn.Module) -> TensorParallelPlacement | None:
    """How the linear `module` is spread; None for what is no linear that can have an adapter. Needs process groups."""
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
