"""All patches of torch and megatron-core, one file each, which says what it replaces and in which versions.

Importing them changes nothing. `megabridge.platform.prepare` installs those that are needed before megatron-core is imported; the
others are installed by the code that needs them.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Final

import torch
from torch.torch_version import TorchVersion

from megabridge.errors import ConfigError

MEGATRON: Final = ("0.19.2", "0.20")
"""The first version of megatron-core that the patches, which use private names, support, and the first that they don't."""
TORCH: Final = ("2.11.0a0", "2.15")
"""The same for torch, of which only public names are replaced: a later version gives a warning, not an error."""


def check_megatron(patch: str) -> None:
    """Raises ConfigError if `patch`, the name of its module, does not support the installed version of megatron-core."""
    import megatron.core

    first, beyond = MEGATRON
    if not first <= TorchVersion(megatron.core.__version__) < beyond:  # a TorchVersion compares as a version
        raise ConfigError(
            f"{patch} replaces a part of megatron-core {first} or later, before {beyond}, but {megatron.core.__version__} "
            f"is installed; pip install 'megatron-core>={first},<{beyond}'."
        )


def check_torch(patch: str) -> None:
    """Raises ConfigError if torch is older than `patch`, the name of its module, supports; warns if it is newer."""
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
    """Warns once for all patches."""
    warnings.warn(
        f"patches of torch were tested before {TORCH[1]}, not with {version}; pip install 'torch<{TORCH[1]}'", stacklevel=4
    )
