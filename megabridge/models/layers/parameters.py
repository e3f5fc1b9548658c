"""Where the parameters of our layers are made."""

from __future__ import annotations

from typing import Any

import torch

import megabridge.platform as platform


def empty(config: Any, *shape: int) -> torch.nn.Parameter:
    """A parameter in config.params_dtype, uninitialised, on this rank's device.

    With `use_cpu_initialization`, for a model that is converted or planned only, a surrounding torch.device() holds.
    """
    device = None if config.use_cpu_initialization else platform.device()
    return torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
