"""torch.compile that gives back what it is given, while megatron-core is imported.

Stands for the decorator of megatron/core/jit.py:18-30, which is torch.compile: fused functions are compiled when they are first
called, which on a CPU takes seconds of inductor, and a C++ compiler. What imports the decorator later gets the one that was made
here. torch 2.11 and later, megatron-core 0.19.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megabridge.platform import patches


def _uncompiled(model: Any = None, **kwargs: object) -> Any:
    """As a call, and as a decorator with arguments."""
    return model if model is not None else (lambda function: function)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """While entered; torch has its own again afterwards."""
    patches.check_torch(__name__)
    real = torch.compile
    torch.compile = _uncompiled
    try:
        yield
    finally:
        torch.compile = real
