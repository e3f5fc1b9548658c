"""Avoids a copy when the parts of a tensor that a checkpoint was read into in place are merged.

Replaces the `merge_fn` of entries that megatron-core's modules split into parts
(megatron/core/dist_checkpointing/mapping.py:456-520; megatron/core/transformer/mlp.py: the gate and the linear half of linear_fc1),
which concatenates. If the parts are views of the whole tensor, it is filled already. megatron-core 0.19.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megabridge.platform import patches


def merge_in_place(factories: Any, wholes: Any) -> None:
    """Replaces the merge functions in the nested dict `factories`, so that views of the tensors in `wholes` aren't copied."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    patches.check_megatron(__name__)
    for key, factory in factories.items():
        if isinstance(factory, ShardedTensorFactory):
            factories[key] = _merging_in_place(factory, wholes[key].data)
        else:
            merge_in_place(factory, wholes[key])


def _merging_in_place(factory: Any, whole: Any) -> Any:
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    def merged(parts: Any) -> Any:
        pieces = list(nested_values(parts)) if isinstance(parts, dict | list) else [parts]
        in_place = isinstance(whole, torch.Tensor) and all(_is_inside(piece, whole) for piece in pieces)
        return whole if in_place and sum(piece.numel() for piece in pieces) == whole.numel() else factory.merge_fn(parts)

    return replace(factory, merge_fn=merged)


def _is_inside(piece: Any, whole: torch.Tensor) -> bool:
    """Whether `piece` is a view of `whole`."""
    return isinstance(piece, torch.Tensor) and piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
