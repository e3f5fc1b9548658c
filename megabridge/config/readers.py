"""Checks that some part of a run reads each setting: one that nothing reads is an error and not silently ignored. No torch.

A setting counts if the user gave it, on the command line or in a file of their own, and it is not the default. Settings that aren't
in `READERS` count as read in every run. A recipe or a callback of the user's own may read anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from megabridge.config.schema import Config
from megabridge.config.value_types import shown
from megabridge.errors import ConfigError, listed

RECIPES: Final = "finetune pretrain convert plan bench check collect compare draft evaluate prepare_data report show_data".split()
"""Recipes of the package `recipes`; one of the user's own may read anything."""
TRAINING: Final = ("finetune", "pretrain")
PLANNED: Final = (*TRAINING, "plan", "show_data")
"""Recipes that train, and those that plan or preview such a run: they accept all of its settings."""
CALLBACKS: Final = tuple(
    f"megabridge.callbacks.{name}"
    for name in "answer.Answer evaluate.Evaluate hf_export.HFExport parity.ImportParity profile.Profile progress.Progress".split()
)
"""Callbacks of megabridge, of which only EXPORT exports."""
EXPORT: Final = "megabridge.callbacks.hf_export.HFExport"
_EVERYWHERE: Final = ("experiment", "recipe")
"""Groups whose files may set keys of any group."""
_ABSENT: Final = object()


@dataclass(frozen=True)
class Reader:
    """A part of a run, named `by`, that reads `settings` (and all below them); `reads` tells whether a run has it.

    With `is_typed`, the settings count only on the command line, because the file of a training run also serves to convert or check
    its model. With `asks`, they count there even with their default value.
    """

    settings: tuple[str, ...]
    by: str
    reads: Callable[[Config], bool]
    is_typed: bool = False
    asks: bool = False


def _of(group: str, names: str) -> tuple[str, ...]:
    return tuple(f"{group}.{name}" for name in names.split())


def recipe_name(config: Config) -> str | None:
    """The name of the run's recipe; None where it is one of the user's own."""
    module, _, function = config.recipe.target.partition(":")
    name = module.removeprefix("recipes.")
    return name if module.startswith("recipes.") and name in RECIPES and function == "main" else None


def _recipe(*names: str) -> Callable[[Config], bool]:
    def reads(config: Config) -> bool:
        name = recipe_name(config)
        return name is None or name in names

    return reads


_trains, _is_planned, _converts = _recipe(*TRAINING), _recipe(*PLANNED), _recipe("convert")


plans_layouts: Final = _recipe("plan")
"""Whether a run chooses a layout, and doesn't have it; a recipe of one's own may."""
may_choose: Final = _recipe(*TRAINING, "plan")
"""Whether parallel=auto means something to a run."""


def _has_export(config: Config) -> bool:
    targets = [node.get("_target_") for node in config.callbacks.values() if isinstance(node, Mapping)]
    return any(target == EXPORT or target not in CALLBACKS for target in targets)


def _publishes(config: Config) -> bool:
    """Whether a training run exports folders, recipe=convert exports one, or a training run is planned or previewed."""
    if _converts(config):
        return config.conversion.mode in ("export", "roundtrip")
    return _is_planned(config) and (not _trains(config) or (config.checkpoint.hf and _has_export(config)))


def _has_whole_exports(config: Config) -> bool:
    return _publishes(config) and (config.peft.name == "none" or config.peft.merge)


def _imports(config: Config) -> bool:
    if _converts(config):
        return config.conversion.mode in ("import", "roundtrip") or (
            config.conversion.mode == "export" and config.peft.name != "none"
        )
    return config.model.load_weights and _recipe(*PLANNED, "check", "compare")(config)


def _is_half(config: Config) -> bool:
    return config.model.dtype == "float16" or bool({"fp16", "params_dtype"} & set(config.model.provider))


_PUBLISHING: Final = "callbacks.hf_export with checkpoint.hf=true, and recipe=convert conversion.mode=export or roundtrip,"
READERS: Final[tuple[Reader, ...]] = (
    Reader(("prepare",), "recipe=prepare_data", _recipe("prepare_data")),
    Reader(("bench",), "recipe=bench", _recipe("bench")),
    Reader(
        (*_of("plan", "gpus device usable"), "plan.figures"),
        "parallel=auto and recipe=plan",
        lambda config: config.parallel.auto or plans_layouts(config),
    ),
    Reader(_of("plan", "show traced storage_gbs storage_total_gbs arguments"), "recipe=plan", _recipe("plan")),
    Reader(("sweep",), "recipe=collect or recipe=report", _recipe("collect", "report")),
    Reader(("conversion.mode",), "recipe=convert", _converts),
    Reader(
        ("conversion.output",),
        "recipe=convert with another conversion.mode than verify",
        lambda config: _converts(config) and config.conversion.mode != "verify",
    ),
    Reader(
        ("conversion.folder", "conversion.source"),
        "recipe=convert conversion.mode=verify",
        lambda config: _converts(config) and config.conversion.mode == "verify",
    ),
    Reader(
        _of("conversion", "allow_missing allow_unexpected allow_bin reader dedupe"),
        "an import of weights (model.load_weights=true)",
        _imports,
    ),
    Reader(("conversion.export_dtype", "conversion.writer"), _PUBLISHING, _publishes),
    Reader(
        ("conversion.export_quantization", "conversion.max_shard_size"),
        f"{_PUBLISHING} of a whole model (with adapters: peft.merge=true)",
        _has_whole_exports,
    ),
    Reader(
        ("checkpoint.hf",),
        "callbacks.hf_export, as in callbacks=default,",
        lambda config: not _trains(config) or not config.checkpoint.hf or _has_export(config),
        asks=True,
    ),
    Reader(
        ("callbacks.answer.prompt",),
        "an export of a whole model by callbacks.hf_export (checkpoint.hf=true; with adapters: peft.merge=true)",
        lambda config: not _trains(config) or _has_whole_exports(config),
    ),
    Reader(
        (
            *_of("checkpoint", "save_every save_at_end native hf keep_last keep_best accept_changes path on_full_disk spare_path"),
            *("recipe.epochs", "recipe.eval_every", "recipe.log_every", "policy", "scheduler"),
        ),
        "recipe=finetune and recipe=pretrain",
        _is_planned,
        is_typed=True,
    ),
    Reader(
        _of("peft", "target_modules exclude_modules target_parameters r lora_alpha lora_dropout use_rslora path merge"),
        "peft=lora or peft=dora",
        lambda config: config.peft.name != "none",
    ),
    Reader(_of("optimizer", "beta1 beta2 eps"), "optimizer=adam", lambda config: config.optimizer.name == "adam"),
    Reader(_of("optimizer", "momentum"), "optimizer=sgd", lambda config: config.optimizer.name == "sgd"),
    Reader(
        _of("optimizer", "loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis"),
        "model.dtype=float16",
        _is_half,
    ),
    Reader(("scheduler.wsd_decay",), "scheduler=wsd", lambda config: config.scheduler.name == "wsd"),
    Reader(("scheduler.min_lr",), "a scheduler other than constant", lambda config: config.scheduler.name != "constant"),
    Reader(
        ("policy.spike_factor", "policy.spike_window"),
        "policy.spike=stop, skip or rollback",
        lambda config: config.policy.spike != "ignore",
    ),
    Reader(
        ("policy.limit",),
        "policy.nonfinite or policy.spike=skip or rollback",
        lambda config: bool({"skip", "rollback"} & {config.policy.nonfinite, config.policy.spike}),
    ),
    Reader(("model.tokenizer",), "a model without model.path", lambda config: config.model.path is None),
    Reader(("model.revision", "model.trust_remote_code"), "a model with model.path", lambda config: config.model.path is not None),
)


def check_readers(config: Config, overrides: Collection[str], conf: Path) -> None:
    """Raises ConfigError for every setting that the user gave and that nothing in this run reads, and names what would read it.

    `overrides` are those of the command line, as typed; `conf` is the folder of our own config groups, whose values the user didn't
    give.
    """
    values, defaults, typed = asdict(config), asdict(Config()), _typed(overrides)
    found: dict[str, tuple[object, str, bool]] = {}
    for reader in READERS:
        if reader.reads(config):
            continue
        for name in (leaf for setting in reader.settings for leaf in _leaves(values, setting)):
            value, is_typed = _at(values, name), any(name == key or name.startswith(f"{key}.") for key in typed)
            is_default = value == _at(defaults, name) or value is None
            if (is_typed or not reader.is_typed) and (not is_default or (is_typed and reader.asks)):
                found.setdefault(name, (value, reader.by, is_typed))
    ours = _ours(conf, {name.partition(".")[0] for name, (_, _, is_typed) in found.items() if not is_typed})
    problems = [
        f"{name}={shown(value)} has no effect in this run: {by} would read it; remove it."
        for name, (value, by, is_typed) in found.items()
        if is_typed or (name, json.dumps(value, default=str)) not in ours
    ]
    if problems:
        raise ConfigError(listed(problems))


def check_length(config: Config, overrides: Collection[str]) -> None:
    """Raises ConfigError where the length of a run was typed twice: recipe.steps beside recipe.epochs, which would replace it."""
    if config.recipe.epochs is not None and "recipe.steps" in _typed(overrides):
        raise ConfigError(
            f"recipe.steps={config.recipe.steps} must not stand beside recipe.epochs={config.recipe.epochs:g}, from which steps "
            "follow; take one of them away (recipe.epochs=null where a file sets it)."
        )


def _typed(overrides: Collection[str]) -> set[str]:
    """Returns the settings that overrides name, without the groups for which they choose a file."""
    pairs = [(key.lstrip("+"), value) for key, _, value in (text.partition("=") for text in overrides) if not key.startswith("~")]
    return {key for key, value in pairs if "." in key or value.lstrip().startswith("{") or key == "sweep"}


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part, _ABSENT) if isinstance(values, Mapping) else _ABSENT
    return values


def _leaves(values: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yields the names of the single settings below `name`, or `name` itself; nothing where the config lacks it."""
    value = _at(values, name)
    if isinstance(value, Mapping):
        for key in value:
            yield from _leaves(values, f"{name}.{key}")
    elif value is not _ABSENT:
        yield name


def _ours(conf: Path, groups: Collection[str]) -> set[tuple[str, str]]:
    """Returns the settings of these groups in our own files, as (name, value as JSON)."""
    return set().union(*(_settings_in(conf, group) for group in {*groups, *_EVERYWHERE})) if groups else set()


@cache
def _settings_in(conf: Path, group: str) -> frozenset[tuple[str, str]]:
    said: set[tuple[str, str]] = set()
    for file in (conf / group).glob("*.yaml"):
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False) or {}
        content.pop("defaults", None)
        is_global = "@package _global_" in file.read_text(encoding="utf-8").partition("\n")[0]
        nested = content if is_global else {group: content}
        said |= {(leaf, json.dumps(_at(nested, leaf), default=str)) for key in nested for leaf in _leaves(nested, key)}
    return frozenset(said)
