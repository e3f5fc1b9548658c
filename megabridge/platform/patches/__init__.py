"""Every change that megabridge makes to torch and megatron-core, one file each: what it stands for upstream, in which versions.

None is made by an import. Those that a process needs before megatron-core is imported are made by `megabridge.platform.prepare`;
the others by what needs them, when it does.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Final

import torch
from torch.torch_version import TorchVersion

from megabridge.errors import ConfigError

MEGATRON: Final = ("0.19.2", "0.20")
"""The first version of megatron-core whose private names the patches know, and the first that they don't."""
TORCH: Final = ("2.11.0a0", "2.15")
"""The same for torch, of which only public names are replaced: a later version is warned of, not refused."""


def check_megatron(patch: str) -> None:
    """Raises ConfigError where the installed megatron-core is not one that `patch`, the name of its module, was written for."""
    import megatron.core

    first, beyond = MEGATRON
    if not first <= TorchVersion(megatron.core.__version__) < beyond:  # which compares versions
        raise ConfigError(
            f"{patch} replaces a part of megatron-core {first} or later, before {beyond}, but {megatron.core.__version__} "
            f"is installed; pip install 'megatron-core>={first},<{beyond}'."
        )


def check_torch(patch: str) -> None:
    """Raises ConfigError where torch is older than `patch`, the name of its module, was written for; warns where it is newer."""
    first, beyond = TORCH
    if TorchVersion(torch.__version__) < first:
        raise ConfigError(
            f"{patch} replaces a part of torch {first} or later, but {torch.__version__} is installed; "
            f"pip install 'torch>={first},<{beyond}'."
        )
    if TorchVersion(torch.__version__) >= beyond:
        _warn(torch.__version__)


@cache
def _warn(version: str) -> None:
    """Once for all patches."""
    warnings.warn(
        f"patches of torch were tested before {TORCH[1]}, not with {version}; pip install 'torch<{TORCH[1]}'", stacklevel=4
    )
