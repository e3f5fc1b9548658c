"""deterministic=true: bitwise equal results from run to run, on the same devices and layout."""

from __future__ import annotations

import os

import torch


def require() -> None:
    """Makes torch refuse non-deterministic operations. Must be called before anything is computed on a device.

    Also sets environment variables of cuBLAS, Transformer Engine and NCCL, as megatron/training/arguments.py requires, unless they
    are set already.
    """
    for name, value in {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "Ring",
    }.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
