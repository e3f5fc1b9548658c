"""The only place that checks whether an optional package is installed, and knows how to install it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from megabridge.errors import ConfigError


@dataclass(frozen=True)
class Extra:
    """An optional package: its import name, its purpose, and the command that installs it."""

    module: str
    purpose: str
    install: str

    @property
    def missing(self) -> str:
        """What to say where it is needed and not installed."""
        return f"{self.purpose} needs the package {self.module}, which is not installed; {self.install}"

    def is_installed(self) -> bool:
        """Whether it can be imported; it is not imported."""
        return find_spec(self.module) is not None


EXTRAS: Final[Mapping[str, Extra]] = {
    extra.module: extra
    for extra in (
        Extra("transformer_engine", "backend=te", "pip install --no-build-isolation 'transformer_engine[pytorch]'"),
        Extra("gguf", "unpacking the quickstart model", "pip install gguf"),
        Extra("accelerate", "reading quantised weights with transformers", "pip install accelerate"),
        Extra("lm_eval", "an evaluation of kind lm_eval", "pip install 'megabridge[eval]'"),
        Extra("wandb", "logger=wandb", "pip install wandb"),
        Extra("rich", "progress bars", "pip install rich"),
    )
}


def is_installed(module: str) -> bool:
    """Whether the optional package imported as `module` is installed."""
    return EXTRAS[module].is_installed()


def require(module: str) -> None:
    """Raises ConfigError, with the command that installs `module`, when it is missing."""
    extra = EXTRAS[module]
    if not extra.is_installed():
        raise ConfigError(f"{extra.missing}.")
