"""Turns torch.compile off while megatron-core is imported.

Replaces the decorator of megatron/core/jit.py:18-30, which is torch.compile: fused functions are compiled when they are first
called, which on a CPU takes seconds of inductor, and needs a C++ compiler. Later imports of the decorator get the one that was made
here. torch 2.11 and later, megatron-core 0.19.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megabridge.platform import patches


def _uncompiled(model: Any = None, **kwargs: object) -> Any:
    """torch.compile, called directly or as a decorator with arguments, without compiling."""
    return model if model is not None else (lambda function: function)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Installs it within the block, and restores torch's own afterwards."""
    patches.check_torch(__name__)
    real = torch.compile
    torch.compile = _uncompiled
    try:
        yield
    finally:
        torch.compile = real
