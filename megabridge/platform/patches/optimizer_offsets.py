"""Offsets of parameters in a buffer without the padding between its buckets, while the optimizer's state is taken out of it.

Stands for `param_index_map` of megatron/core/distributed/param_and_grad_buffer.py as optimizer/distrib_optimizer.py:1690-1828 reads
it: a `fully_reshardable` save takes the state out of a buffer without the padding, but by offsets that count it. Where a bucket
ends off a multiple of 128 x dp elements and is not the last, all that follows is shifted: wrong state, no error.
megatron-core 0.19.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from megabridge.platform import patches


@contextlib.contextmanager
def installed(buffers: Sequence[Any]) -> Iterator[None]:
    """While entered, the buffers' `param_index_map` says where a parameter lies once the padding after each bucket is gone."""
    patches.check_megatron(__name__)
    before = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            padding = [len(bucket.grad_data) - bucket.numel_unpadded for bucket in buffer.buckets]
            buffer.param_index_map = {
                parameter: (start - sum(padding[:bucket]), end - sum(padding[:bucket]), bucket)
                for parameter, (start, end, bucket) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, offsets in zip(buffers, before, strict=True):
            buffer.param_index_map = offsets
