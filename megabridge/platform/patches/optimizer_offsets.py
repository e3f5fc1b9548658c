"""Corrects the offsets of parameters in a buffer while the optimizer's state is saved: without the padding between buckets.

Replaces `param_index_map` of megatron/core/distributed/param_and_grad_buffer.py as optimizer/distrib_optimizer.py:1690-1828 reads
it: a `fully_reshardable` save takes the state out of a buffer without padding, but by offsets that include it. If a bucket other
than the last does not end at a multiple of 128 x dp elements, everything after it is shifted: wrong state, no error.
megatron-core 0.19.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from megabridge.platform import patches


@contextlib.contextmanager
def installed(buffers: Sequence[Any]) -> Iterator[None]:
    """Within the block the buffers' `param_index_map` has the offsets of parameters without the padding after each bucket."""
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
