"""Checks that every number of the config is within its bounds, and that every path can be looked up. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

from megabridge.config.plan_schema import FiguresConfig
from megabridge.config.schema import Config
from megabridge.errors import CheckpointError, ConfigError, listed
from megabridge.storage import regular_files

_NEARLY_ONE: Final = math.nextafter(1.0, 0.0)
BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "checkpoint.save_every": (1, math.inf),
    "checkpoint.keep_last": (1, math.inf),
    "checkpoint.keep_best": (1, math.inf),
    "recipe.eval_every": (1, math.inf),
    "recipe.epochs": (1e-6, math.inf),
    "prepare.workers": (1, 4096),
    "prepare.max_bad_share": (0, 1),
    "bench.repeats": (1, math.inf),
    "plan.gpus": (1, 1 << 20),
    "plan.usable": (0.01, 1),
    "plan.show": (1, math.inf),
    "plan.traced": (0, math.inf),
    "plan.storage_gbs": (1e-6, math.inf),
    "plan.storage_total_gbs": (1e-6, math.inf),
    **dict.fromkeys((f"plan.figures.{each.name}" for each in fields(FiguresConfig) if each.name != "per_host"), (1e-6, math.inf)),
    "plan.figures.per_host": (1, math.inf),
    "optimizer.lr": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.beta1": (0, _NEARLY_ONE),
    "optimizer.beta2": (0, _NEARLY_ONE),
    "optimizer.eps": (0, math.inf),
    "optimizer.momentum": (0, _NEARLY_ONE),
    "optimizer.clip_grad": (0, math.inf),
    "optimizer.loss_scale_window": (1, math.inf),
    "optimizer.hysteresis": (1, math.inf),
    "scheduler.warmup_steps": (0, math.inf),
    "scheduler.min_lr": (0, math.inf),
    "scheduler.decay_steps": (1, math.inf),
    "policy.spike_window": (1, math.inf),
    "policy.limit": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "timeout": (1e-3, 1e8),
}
"""Minimum and maximum of the settings that no other rule bounds."""
CALLBACKS: Final[Mapping[str, tuple[float, float]]] = {
    "callbacks.import_parity.logits_tokens": (0, math.inf),
    "callbacks.hf_export.logits_tokens": (0, math.inf),
    "callbacks.answer.max_new_tokens": (1, math.inf),
}
"""The same for the callbacks in conf/callbacks, by their names there."""
UNBOUNDED: Final = ("model.hf.", "recipe.options.")
"""Settings that may be infinite: Mamba's time_step_limit is."""
_LARGEST: Final = 1 << 53
"""Integers below this are exact in every JSON reader."""


def check_numbers(config: Config) -> None:
    """Raises ConfigError for every number, at any depth, that is NaN, infinite, outside its bounds, or an integer beyond 2**53.

    Numbers below model.hf and recipe.options may be infinite.
    """
    problems = []
    for path, value in _numbers(config, ""):
        least, most = BOUNDS.get(path) or CALLBACKS.get(path, (-math.inf, math.inf))
        if isinstance(value, int) and abs(value) >= _LARGEST:
            problems.append(f"{path}={str(value)[:40]} must be below 2**53 in size; use a smaller number")
        elif math.isnan(value) or (math.isinf(value) and not path.startswith(UNBOUNDED)):
            problems.append(f"{path}={value} must be a finite number; set one, or remove the setting")
        elif not least <= value <= most:
            bounds = f"from {least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
            problems.append(f"{path}={value} must be {bounds}; set it so")
    if problems:
        raise ConfigError(listed(problems))


def check_paths(config: Config) -> None:
    """Raises ConfigError for every setting with a path that the system can't look up."""
    model, conversion, checkpoint = config.model, config.conversion, config.checkpoint
    named = {
        "model.path": model.path,
        "model.tokenizer": model.tokenizer,
        "conversion.output": conversion.output,
        "conversion.folder": conversion.folder,
        "conversion.source": conversion.source,
        "checkpoint.path": checkpoint.path,
        "checkpoint.spare_path": checkpoint.spare_path,
        "checkpoint.resume": checkpoint.resume,
        "peft.path": config.peft.path,
        "prepare.output": config.prepare.output,
        "sweep": config.sweep,
        "run_dir": config.run_dir,
    }
    problems = [] if config.run_dir else ["run_dir='' must name a directory of the run's own; give one."]
    for key, path in named.items():
        try:
            regular_files.expand(path or ".")
        except CheckpointError as error:
            problems.append(f"{key}={error}")
    if problems:
        raise ConfigError(listed(problems))


def _numbers(node: Any, path: str) -> Iterator[tuple[str, int | float]]:
    if is_dataclass(node):
        for each in fields(node):
            yield from _numbers(getattr(node, each.name), f"{path}.{each.name}" if path else each.name)
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _numbers(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _numbers(value, f"{path}[{index}]")
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path, node
