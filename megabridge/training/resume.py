"""Which checkpoint a run starts from, and whether it may."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megabridge import regular
from megabridge.checkpoint import folders, native
from megabridge.config import Config
from megabridge.errors import ConfigError

# With another value of these, "consumed samples" no longer says where in the data a run is.
_ORDER: Final = ("seed", "recipe.global_batch_size", "recipe.seq_length", "data", "model.name", "model.hf")


def settings(config: Config) -> dict[str, Any]:
    """What the course of a run depends on, flat, as a native checkpoint keeps it."""
    values: dict[str, Any] = {
        "seed": config.seed,
        "recipe.steps": config.recipe.steps,
        "recipe.global_batch_size": config.recipe.global_batch_size,
        "recipe.seq_length": config.recipe.seq_length,
        "data": _text(config.data),
        "model.name": config.model.name,
        "model.dtype": config.model.dtype,
        "model.hf": _text(config.model.hf),
        "parallel": "".join(f"{name}{size}" for name, size in native.layout().items() if size > 1) or "single",
    }
    for group in ("optimizer", "scheduler", "peft"):
        fields = dataclasses.asdict(getattr(config, group))
        values |= {f"{group}.{name}": value for name, value in fields.items()}
    return values


def changes(saved: Mapping[str, Any], current: Mapping[str, Any], *, accepted: Sequence[str] = ()) -> list[str]:
    """A line for each setting that differs and may; raises ConfigError for those that may not, but for the `accepted`.

    Where a setting that the data's order depends on is accepted, the run goes on after as many samples as it has seen.
    """
    if unknown := [name for name in accepted if name not in _ORDER]:
        raise ConfigError(f"checkpoint.accept_changes={unknown} must be of {', '.join(_ORDER)}; others need not be accepted.")
    different = {name: (saved[name], value) for name, value in current.items() if name in saved and saved[name] != value}
    lines = {name: f"{name}: {before} -> {now}" for name, (before, now) in different.items()}
    forbidden = [lines[name] for name in _ORDER if name in lines and name not in accepted]
    if forbidden:
        raise ConfigError(
            "a run can't continue with other data or another model; put these back, or name them in checkpoint.accept_changes:"
            "\n  " + "\n  ".join(forbidden)
        )
    return list(lines.values())


def source(config: Config, checkpoints: Path) -> Path | None:
    """The native folder to continue from, or None to begin at step 0.

    Raises ConfigError where the run would later meet steps that another run left in `checkpoints`.
    """
    steps = folders.committed_steps(checkpoints)
    resume = config.checkpoint.resume
    if resume == "auto":
        return folders.latest(checkpoints)
    if resume == "none":
        found, start = None, 0
    else:
        found = regular.place(resume)
        if not folders.is_committed(found) and folders.is_committed(found / folders.NATIVE):
            found = found / folders.NATIVE
        if not folders.is_committed(found):
            raise ConfigError(
                f"checkpoint.resume={resume} must be none, auto or the folder of a saved step; there is no complete "
                "native checkpoint there."
            )
        here = [step for step, folder in steps.items() if folder.resolve() == found.resolve()]
        start = here[0] if here else 0
    later = [step for step in steps if step > start]
    if later:
        raise ConfigError(
            f"checkpoint.resume={resume} would run over step_{later[0]} that is already in {checkpoints}; use "
            "checkpoint.resume=auto to continue it, or another run directory."
        )
    return found


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
