"""deterministic=true: the same bits from run to run, on the same devices and layout."""

from __future__ import annotations

import os

import torch


def require() -> None:
    """Makes torch refuse operations whose result may differ from run to run. Call it before anything is computed on a device.

    cuBLAS needs a workspace of fixed size, Transformer Engine and NCCL must be told (megatron/training/arguments.py asks for the
    same); what the environment already says of these stays.
    """
    for name, value in {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "Ring",
    }.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
