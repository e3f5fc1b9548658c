"""Allocates the parameters of our layers."""

from __future__ import annotations

from typing import Any

import torch

import megabridge.platform as platform


def empty(config: Any, *shape: int) -> torch.nn.Parameter:
    """Returns an uninitialised parameter in config.params_dtype on this rank's device.

    With `use_cpu_initialization` (a model that is only converted or planned) the device is that of a surrounding torch.device().
    """
    device = None if config.use_cpu_initialization else platform.device()
    return torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
