"""Checks of the config before anything is downloaded or started: choices, places of `_target_`, layout, model and batches.

No torch. Where the model's sizes aren't known (a hub id without a YAML of its own) the checks that need them are left to the ranks,
which repeat all of them on the real config. All problems of a kind are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, Final

from megabridge.config import layout_rules
from megabridge.config.schema import CONFIG_FORMAT, Config, OptimizerConfig, SchedulerConfig
from megabridge.errors import ConfigError, listed
from megabridge.parallel.topology import Topology

TARGET_PLACES: Final = "data, callbacks.<name> and logger.<name>"


def nearest(word: str, words: list[str]) -> str:
    """Returns the end of a sentence: `; did you mean 'x'?` for the closest of `words`, or a full stop."""
    close = get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else "."


def check_format(config: Config) -> None:
    """Raises ConfigError for a config with another version of the keys."""
    if config.config_format != CONFIG_FORMAT:
        raise ConfigError(
            f"config_format={config.config_format} must be {CONFIG_FORMAT}, which this version of megabridge reads; run it with "
            "the version that wrote it, or bring its keys up to date (CHANGELOG.md)."
        )


def check_choices(config: Config) -> None:
    """Raises ConfigError for every text field whose value is not among its choices."""
    problems = [
        f"{path}={value!r} is not one of {', '.join(choices)}{nearest(str(value), list(choices))}"
        for path, value, choices in _choices(config, "")
        if value is not None and value not in choices
    ]
    if problems:
        raise ConfigError(listed(problems))


def _choices(node: Any, prefix: str) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    for each in fields(node):
        value = getattr(node, each.name)
        if is_dataclass(value):
            yield from _choices(value, f"{prefix}{each.name}.")
        elif "choices" in each.metadata:
            choices = each.metadata["choices"]
            yield f"{prefix}{each.name}", value, choices() if callable(choices) else choices


def check_targets(config: Config) -> None:
    """Raises ConfigError for a `_target_` outside data, callbacks.* and logger.*, or one of these without it.

    That the target is a class of the right base is checked by `megabridge.config.instantiate.build`, in the ranks: finding out
    here would import torch.
    """
    problems: list[str] = []
    nodes: dict[str, Any] = {"data": config.data}
    nodes |= {f"callbacks.{name}": node for name, node in config.callbacks.items()}
    nodes |= {f"logger.{name}": node for name, node in config.logger.items()}
    for path, node in nodes.items():
        if node is None:
            continue
        target = node.get("_target_") if isinstance(node, dict) else None
        if isinstance(target, str) and "." in target:
            node = {key: value for key, value in node.items() if key != "_target_"}
        else:
            problems.append(f"{path}._target_={target!r} must name a class as package.module.Class")
        rule = f"is not allowed; a _target_ may stand in {TARGET_PLACES}"
        problems += [f"{where} {rule}" for where in _targets(node, path)]
    for name in ("hf", "provider"):
        node = getattr(config.model, name)
        problems += [f"{where} is not allowed; remove it" for where in _targets(node, f"model.{name}")]
    problems += [f"{where} is not allowed; remove it" for where in _targets(config.recipe.options, "recipe.options")]
    if problems:
        raise ConfigError(listed(problems))


def _targets(node: Any, path: str) -> Iterator[str]:
    """Yields the places of `_target_` in `node`, at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield f"{path}._target_={value!r}"
            else:
                yield from _targets(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{path}[{index}]")


def check_model(config: Config) -> None:
    """Raises ConfigError when the config names no model. A `family` alone stands for its tiny model."""
    model = config.model
    if model.path is None and config.family is not None and config.recipe.steps == 0:
        return
    if model.path is None and not model.hf:
        raise ConfigError(f"model={model.name} has neither model.path nor a shape; give model.path=<folder or hub id>.")
    if model.load_weights and model.path is None:
        raise ConfigError("model.load_weights=true needs model.path=<folder or hub id>; set it, or load_weights=false.")


def check_peft(config: Config) -> None:
    """Raises ConfigError for optimizer.freeze together with adapters, with which all other parameters are frozen anyway."""
    if config.peft.name != "none" and config.optimizer.freeze:
        rule = f"optimizer.freeze has no meaning with peft={config.peft.name}, which trains its adapters alone"
        raise ConfigError(f"{rule}; remove it.")


def check_named(config: Config) -> None:
    """Raises ConfigError when recipe.target or family is not module:name of an existing module. Imports only its package."""
    named = [("recipe.target", "function", "recipes.finetune:main", config.recipe.target)]
    if config.family is not None:
        named.append(("family", "NAME", "my_package.my_family:FAMILY", config.family))
    for key, kind, example, value in named:
        module, colon, name = value.partition(":")
        if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise ConfigError(f"{key}={value!r} must be module:{kind}, such as {example}.")
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ConfigError(f"{key}={value!r}: there is no module {module!r}; check the name and PYTHONPATH.")


def check_training(config: Config) -> None:
    """Raises ConfigError for training settings that can't work together, or would have no effect."""
    checkpoint, policy, optimizer = config.checkpoint, config.policy, config.optimizer
    problems = []
    if policy.spike != "ignore" and policy.spike_factor <= 1:
        problems.append(f"policy.spike_factor={policy.spike_factor} must be above 1; 2 is usual")
    if optimizer.initial_loss_scale < optimizer.min_loss_scale or optimizer.min_loss_scale <= 0:
        problems.append(
            f"optimizer.min_loss_scale={optimizer.min_loss_scale} must be above 0 and at most "
            f"initial_loss_scale={optimizer.initial_loss_scale}"
        )
    if "rollback" in (policy.nonfinite, policy.spike) and not (checkpoint.native and checkpoint.save_every):
        problems.append("policy rollback needs saved steps to go back to; set checkpoint.native=true and checkpoint.save_every")
    if is_training(config) and config.recipe.steps and config.recipe.epochs is None:  # else the steps follow from the data
        problems += schedule_problems(config.optimizer, config.scheduler, config.recipe.steps)
    if checkpoint.keep_best and not checkpoint.native:
        problems.append(f"checkpoint.keep_best={checkpoint.keep_best} keeps native steps; set checkpoint.native=true")
    if problems:
        raise ConfigError(listed(problems))


def is_training(config: Config) -> bool:
    """Whether the run's recipe is one of ours that trains."""
    return config.recipe.target in ("recipes.finetune:main", "recipes.pretrain:main")


def schedule_problems(optimizer: OptimizerConfig, scheduler: SchedulerConfig, steps: int) -> list[str]:
    """What keeps the learning rate from going through its shape in a run of `steps`, a sentence each."""
    problems = []
    over = decay_steps(scheduler, steps)
    if scheduler.name == "wsd" and (last := wsd_steps(scheduler, steps)) > over:
        problems.append(f"scheduler.decay_steps={last} must be at most recipe.steps={steps} for scheduler.name=wsd; lower it")
    if scheduler.warmup_steps >= over:
        problems.append(
            f"scheduler.warmup_steps={scheduler.warmup_steps} must be less than the {over} steps over which the rate decays; "
            "shorten the warm-up or raise recipe.steps"
        )
    if scheduler.min_lr > optimizer.lr:
        problems.append(f"scheduler.min_lr={scheduler.min_lr} must be at most optimizer.lr={optimizer.lr}; lower it")
    return problems


def decay_steps(scheduler: SchedulerConfig, steps: int) -> int:
    """The steps over which the rate goes through its shape, warm-up and all."""
    over = max(steps, 1) if scheduler.name == "wsd" or scheduler.decay_steps is None else scheduler.decay_steps
    return max(over, scheduler.warmup_steps + 1) if scheduler.name == "constant" else over


def wsd_steps(scheduler: SchedulerConfig, steps: int) -> int:
    """The steps of the last part of wsd."""
    return max(1, steps // 10) if scheduler.decay_steps is None else scheduler.decay_steps


def check_layout(config: Config, topology: Topology, sizes: Mapping[str, Any]) -> None:
    """Raises ConfigError with every broken rule between model, layout and batch.

    `sizes` are the model's native settings as far as they are known (megabridge.families.core.known_sizes).
    """
    backend = layout_rules.backend_of_run(config)
    problems = layout_rules.model_problems(layout_rules.of_run(config, sizes), topology, backend=backend)
    problems += _recipe_problems(config, topology)
    if problems:
        raise ConfigError(listed(problems))


def _recipe_problems(config: Config, topology: Topology) -> list[str]:
    recipe = config.recipe
    sizes = ("global_batch_size", "micro_batch_size", "seq_length", "log_every")
    small = [f"recipe.{name}={getattr(recipe, name)} must be at least 1." for name in sizes if getattr(recipe, name) < 1]
    if recipe.steps < 0:
        small.append(f"recipe.steps={recipe.steps} must not be negative.")
    return small if small or recipe.steps < 1 else layout_rules.step_problems(config, topology)
