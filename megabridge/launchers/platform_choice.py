"""Chooses the platform, GPUs or CPU, of a run that this host starts itself; explains what to do when it fits on neither."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final

from omegaconf import OmegaConf

from megabridge.config import layout_rules, schema, validation
from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.families.core.known_sizes import known_sizes
from megabridge.launchers.prepare import conf_folder
from megabridge.layouts import commands
from megabridge.layouts.shape import is_known, shape_of
from megabridge.parallel.topology import SETTINGS, Topology

LARGEST_ON_CPU: Final = 500_000_000
"""Parameters above which platform=auto does not fall back to a CPU: a step would take minutes."""
BYTES_PER_PARAMETER: Final = 16
"""Lower bound of training's memory: parameter, gradient and Adam's two moments in float32."""
MOST_RANKS: Final = 1024
"""Upper bound of the processes started on one host."""
MOST_ON_CPU: Final = 64
"""Processes that are suggested on a CPU."""
_BATCH: Final = 4
"""recipe.global_batch_size where nothing says otherwise."""
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
    get = known_sizes(config.model).get
    parameters = shape_of(get).parameters if is_known(get) else None
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
    if smaller := _smaller(config, known_sizes(config.model), topology, gpus):
        lines.append(f"on this host: {commands.RUN} {shlex.join([*overrides, *smaller])}")
    if on_cpu and world <= MOST_ON_CPU and topology.cp == 1 and layout_rules.backend_of_run(config) != "te":
        lines.append(f"on this host's CPU: python -m megabridge.run {arguments} platform=cpu")
    elif gpus == 0 and (tiny := _tiny(topology)):
        lines.append(f"the same layout on this host's CPU: python -m megabridge.run {shlex.join(tiny)}")
    return [line.rstrip() for line in lines]


def _smaller(config: Config, sizes: Mapping[str, Any], topology: Topology, gpus: int) -> list[str]:
    """Further overrides for the largest layout of the same kind on `gpus` GPUs; empty where none is known to work."""
    if gpus == 0 or not sizes:
        return []
    tp = max(size for size in layout_rules.allowed_tp(sizes.get) if size <= min(gpus, topology.tp))
    pp = max(1, min(topology.pp, gpus // tp))
    parallel = replace(config.parallel, tp=tp, pp=pp, vpp=1, cp=1, ep=1, etp=None, dp=None, layout=None)
    parallel.sequence_parallel = config.parallel.sequence_parallel and tp > 1
    smaller = replace(config, parallel=parallel)
    try:
        validation.check_layout(smaller, schema.topology(parallel), sizes)
    except ConfigError:
        return []
    return _settings(config.parallel, parallel)


def _tiny(topology: Topology) -> list[str]:
    """Overrides that run the layout with a tiny model on a CPU; empty where that has no such layout."""
    name = "tiny_llama" if topology.ep == 1 and topology.etp is None else "tiny_moe"
    if topology.cp > 1 or topology.world_size > MOST_ON_CPU:
        return []
    model = schema.typed({"model": OmegaConf.load(conf_folder() / "model" / f"{name}.yaml")}).model
    parallel = schema.ParallelConfig(**{key: getattr(topology, key) for key in (*SETTINGS, "dp")})
    parallel.dp = topology.dp if topology.dp > 1 else None
    parallel.sequence_parallel = name == "tiny_moe" and topology.tp > 1
    batch = topology.dp * (topology.pp if topology.vpp > 1 else 1)
    batch = batch if batch > 1 and _BATCH % batch else _BATCH
    run = Config(model=model, parallel=parallel, platform="cpu", recipe=schema.RecipeConfig(global_batch_size=batch))
    try:
        validation.check_layout(run, topology, known_sizes(model))
    except ConfigError:
        return []
    more = [] if batch == _BATCH else [f"recipe.global_batch_size={batch}"]
    return [f"model={name}", *_settings(schema.ParallelConfig(), parallel), *more]


def _settings(before: schema.ParallelConfig, after: schema.ParallelConfig) -> list[str]:
    """The overrides that make one layout of the other."""
    shown = {True: "true", False: "false", None: "null"}
    pairs = [(each.name, getattr(before, each.name), getattr(after, each.name)) for each in fields(before)]
    return [f"parallel.{name}={new if type(new) is int else shown.get(new, new)}" for name, old, new in pairs if old != new]
