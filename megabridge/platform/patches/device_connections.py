"""Sets CUDA_DEVICE_MAX_CONNECTIONS=1, unless it is set already.

With tensor parallelism megatron-core relies on kernels starting in the order of their calls, and warns without this
(megatron/core/tensor_parallel/layers.py, megatron/training/yaml_arguments.py:328). CUDA reads it when a device is first used. Any
version.
"""

from __future__ import annotations

import os


def install() -> None:
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
