"""LoRA: settings of LoRA and DoRA adapters, with the names and meanings of PEFT's LoraConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Final

from megabridge.errors import ConfigError, listed

ALL_LINEAR: Final = "all-linear"
HIGHEST: Final = 65536
"""Upper bound of an adapter's rank; a useful rank is smaller than its linear."""
LARGEST_ALPHA: Final = 1e6
"""Upper bound of the absolute value of lora_alpha."""


@dataclass(frozen=True)
class LoRA:
    """Settings of adapters: a linear computes W x + scaling x B A x, with A [r, in] and B [out, r]; B is initialised with zeros.

    `target_modules` are ends of Hugging Face module names (q_proj, layers.3.mlp.up_proj), with * as wildcard, or all-linear: every
    linear but the output layer; of these, `exclude_modules` get none. `target_parameters` are ends of the names of experts' weights
    that are one 3-D parameter of a layer in transformers' model (experts.gate_up_proj): each expert gets its own A and B. With
    `use_dora` each row of the sum of weights is scaled to a trained magnitude (arXiv 2402.09353). Raises ConfigError with all
    problems.
    """

    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    exclude_modules: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        problems = []
        if type(self.r) is not int or not 1 <= self.r <= HIGHEST:
            problems.append(f"r={self.r} must be at least 1 and at most {HIGHEST}, a whole number")
        if not abs(self.lora_alpha) <= LARGEST_ALPHA:
            problems.append(f"lora_alpha={self.lora_alpha} must be a number from {-LARGEST_ALPHA:g} to {LARGEST_ALPHA:g}")
        if not 0.0 <= self.lora_dropout < 1.0:
            problems.append(f"lora_dropout={self.lora_dropout} must be in [0, 1)")
        if self.use_dora and self.lora_dropout:
            problems.append(f"lora_dropout={self.lora_dropout} must be 0 with use_dora; set it so, or use LoRA")
        if not self.target_modules and not self.target_parameters:
            problems.append(f"target_modules must name linears, or {ALL_LINEAR}")
        if self.target_parameters and self.use_dora:
            problems.append("use_dora must be false with target_parameters, which PEFT has no DoRA for; use LoRA, or linears alone")
        if self.target_parameters and self.lora_dropout:
            problems.append(
                f"lora_dropout={self.lora_dropout} must be 0 with target_parameters, which PEFT has none for; set it so"
            )
        if ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            problems.append(f"target_modules={list(self.target_modules)} must be {ALL_LINEAR} alone, or names")
        if problems:
            raise ConfigError("adapters: " + listed(problems))

    @property
    def scaling(self) -> float:
        """Factor of B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def takes_all(self) -> bool:
        return self.target_modules == (ALL_LINEAR,)

    def is_target(self, module: str, *, is_output: bool = False) -> bool:
        """Whether the Hugging Face module gets an adapter; `is_output` says that it is the output layer."""
        wanted = not is_output if self.takes_all else is_named(module, self.target_modules)
        return wanted and not is_named(module, self.exclude_modules)


def is_named(module: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of `patterns` matches the module's name, or its end after a dot; * matches anything."""
    plain, wild = _sorted(patterns)
    if any(end in plain for end in ends(module)):
        return True
    return any(fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}") for pattern in wild)


def ends(module: str) -> list[str]:
    """The name, and its parts after each dot."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


@lru_cache(maxsize=64)
def _sorted(patterns: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Splits patterns into those without and with a wildcard, for speed: an imported adapter may name every expert's linears."""
    wild = tuple(pattern for pattern in patterns if "*" in pattern)
    return frozenset(patterns).difference(wild), wild
