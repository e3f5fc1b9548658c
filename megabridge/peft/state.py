"""The sharded state dict of adapters for native checkpoints, by canonical names, readable under any layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from megabridge.conversion.parameters import LocalParameter, collect_parameters
from megabridge.mapping import Cut

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory

_EXPERT: Final = re.compile(r"(?<=\.experts)\.\d+(?=\.)")


def sharded_state(chunk: torch.nn.Module) -> dict[str, Any]:
    """Returns the sharded tensors of a chunk's adapters by their names in the chunk. No communication."""
    return {live.local: _sharded(live) for live in collect_parameters([chunk], adapters=True)}


def _sharded(live: LocalParameter) -> Any:
    record = live.record
    cuts = [cut for cut in record.cuts if cut.size > 1 or cut.drops]
    striped = next((cut for cut in cuts if cut.stride > 1), None)
    key, drops = _EXPERT.sub("", record.name), sum(cut.drops for cut in cuts)
    if striped is None:
        return _part(key, live.parameter, _replica(live), cuts, drops)
    others = [cut for cut in cuts if cut is not striped]
    dim = striped.dim - drops

    @torch.no_grad()
    def build(key: str, data: Tensor, replica_id: ReplicaId, flattened_range: Any) -> list[ShardedTensor]:
        size = striped.size * striped.stride
        sections = enumerate(data.chunk(striped.stride, dim))
        return [
            _part(key, section, replica_id, [*others, Cut(striped.dim, 1, size, number * striped.size + striped.index)], drops)
            for number, section in sections
        ]

    @torch.no_grad()
    def merge(sections: list[Tensor]) -> Tensor:
        return torch.cat(sections, dim)

    return ShardedTensorFactory(key, live.parameter, build, merge, _replica(live))


def _part(key: str, data: Tensor, replica: ReplicaId, cuts: Sequence[Cut], drops: int) -> ShardedTensor:
    offsets = [(cut.dim, cut.index, cut.size) for cut in cuts]
    return ShardedTensor.from_rank_offsets(key, data, *offsets, replica_id=replica, prepend_axis_num=drops)


def _replica(live: LocalParameter) -> ReplicaId:
    """The replica id: among the ranks that hold the same elements, (0, 0, 0) is the one that writes them."""
    record = live.record
    if record.is_expert:
        is_cut, index = len(record.cuts) > 1, parallel_state.get_expert_tensor_parallel_rank()
        return 0, 0 if is_cut else index, parallel_state.get_expert_data_parallel_rank()
    index = parallel_state.get_tensor_model_parallel_rank()
    return 0, 0 if record.cuts else index, parallel_state.get_data_parallel_rank(with_context_parallel=True)
