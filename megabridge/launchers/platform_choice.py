"""Chooses the platform, GPUs or CPU, of a run that this host starts itself; explains what to do when it fits on neither."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

from megabridge.config import layout_rules
from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.families.core.known_sizes import known_sizes
from megabridge.layouts import commands
from megabridge.parallel.topology import Topology

LARGEST_ON_CPU: Final = 500_000_000
"""Parameters above which platform=auto does not fall back to a CPU: a step would take minutes."""
BYTES_PER_PARAMETER: Final = 16
"""Lower bound of training's memory: parameter, gradient and Adam's two moments in float32."""
MOST_RANKS: Final = 1024
"""Upper bound of the processes started on one host."""
GPUS_PER_HOST: Final = 8
"""GPUs per host in the suggested multi-host command."""


def choose_platform(config: Config, topology: Topology, *, gpus: int, memory: int, overrides: Sequence[str]) -> str:
    """Returns `cpu` or `cuda` for a run that this host starts itself.

    Raises ConfigError with what is missing and commands that would work, when it can't run here.
    """
    world = topology.world_size
    if world > MOST_RANKS:
        raise ConfigError(
            f"parallel {topology} needs {world} processes, and one host starts at most {MOST_RANKS}; start them on several hosts "
            "with torchrun or srun, or see what each would do with recipe=plan."
        )
    parameters = layout_rules.parameters(known_sizes(config.model).get)
    least = 0 if parameters is None or config.recipe.steps == 0 else parameters * BYTES_PER_PARAMETER
    size = "" if parameters is None else f" (about {parameters / 1e9:.2f}B parameters)"
    name = f"{config.model.name}{size} with parallel {topology}"
    fits_cpu = least <= memory
    if config.platform == "cpu":
        if not fits_cpu:
            raise ConfigError(
                f"platform=cpu: training {name} takes at least {least / 2**30:.0f} GiB, but this host has "
                f"{memory / 2**30:.0f}; use a smaller model, or GPUs."
            )
        return "cpu"
    small = parameters is None or parameters <= LARGEST_ON_CPU or config.recipe.steps == 0
    if config.platform == "auto" and gpus == 0 and small and fits_cpu:
        return "cpu"
    if 0 < world <= gpus:
        return "cuda"
    needed = "1 GPU" if world == 1 else f"{world} GPUs"
    lines = [f"{name} needs {needed}, but this host has {gpus or 'none'}. What would work:"]
    lines += _commands(config, topology, gpus=gpus, on_cpu=small and fits_cpu, overrides=overrides)
    raise ConfigError("\n  ".join(lines))


def _commands(config: Config, topology: Topology, *, gpus: int, on_cpu: bool, overrides: Sequence[str]) -> list[str]:
    """Commands that start the run elsewhere, or a similar one here."""
    world = topology.world_size
    arguments = shlex.join(text for text in overrides if not text.startswith("platform="))
    lines = []
    if world <= GPUS_PER_HOST:
        lines.append(f"on a host with {world} or more: {commands.RUN} {arguments}")
    else:
        hosts, each = commands.spread(world, per_host=GPUS_PER_HOST)
        words = [text for text in overrides if not text.startswith("platform=")]
        lines.append(f"on each of {hosts} hosts with {each} GPUs: {commands.start(world, words, per_host=GPUS_PER_HOST)}")
    kept = [text for text in overrides if text.partition("=")[0].lstrip("+~").partition(".")[0] != "parallel"]
    if smaller := _smaller(known_sizes(config.model), topology, gpus):
        lines.append(f"on this host: python -m megabridge.run {shlex.join([*kept, *smaller])}")
    if on_cpu:
        lines.append(f"on this host's CPU: python -m megabridge.run {arguments} platform=cpu")
    elif gpus == 0:
        layout = [text for text in overrides if text.partition("=")[0].partition(".")[0] == "parallel"]
        tiny = shlex.join(["model=tiny_llama", *layout])
        lines.append(f"the same layout on this host's CPU: python -m megabridge.run {tiny}")
    return [line.rstrip() for line in lines]


def _smaller(sizes: Mapping[str, Any], topology: Topology, gpus: int) -> list[str]:
    """Overrides for the largest similar layout on `gpus` GPUs; empty without a GPU or known sizes."""
    if gpus == 0 or not sizes:
        return []
    tp = max(size for size in layout_rules.allowed_tp(sizes.get) if size <= min(gpus, topology.tp))
    pp = max(1, min(topology.pp, gpus // tp))
    return [f"parallel.tp={tp}", f"parallel.pp={pp}"]
