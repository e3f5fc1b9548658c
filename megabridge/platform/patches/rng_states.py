"""Replaces megatron-core's CUDA generator by the CPU's.

Replaces `_get_cuda_rng_state` and `_set_cuda_rng_state` of megatron/core/tensor_parallel/random.py:104-160, which use
torch.cuda.default_generators, empty without a device. That module then warns at every fork of the generator, because the CPU's
generator is the tracked one: the warning is dropped. megatron-core 0.19.
"""

from __future__ import annotations

from megabridge.platform import patches
from megabridge.platform.patches import quiet
from megabridge.platform.patches.cuda_calls import get_rng_state, set_rng_state


def install() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    patches.check_megatron(__name__)
    megatron_random._set_cuda_rng_state = set_rng_state
    megatron_random._get_cuda_rng_state = get_rng_state
    quiet.drop(megatron_random.__name__, "CPU RNG state changed within GPU RNG context")
