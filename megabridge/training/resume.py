"""Resume: finds the checkpoint that a run continues from, and compares its settings and inputs with the run's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from megabridge.config import redaction
from megabridge.config.schema import Config
from megabridge.config.value_types import differences
from megabridge.errors import ConfigError, plain
from megabridge.parallel import process_groups
from megabridge.parallel.collectives import on_rank_zero
from megabridge.training import input_digests

if TYPE_CHECKING:
    from megabridge.bridge.auto_bridge import AutoBridge
    from megabridge.data import DataModule

# With another value of these, the number of consumed samples no longer gives the position in the data, or adapters were trained on
# other weights. A name stands for all names below it.
_FIXED: Final = (
    "seed",
    "recipe.global_batch_size",
    "recipe.seq_length",
    "data",
    "model.name",
    "model.hf",
    *("peft.name", "peft.r", "peft.lora_alpha", "peft.use_rslora"),
    *("peft.target_modules", "peft.exclude_modules", "peft.target_parameters"),
    input_digests.WEIGHTS,
    input_digests.MODEL,
    input_digests.TOKENIZER,
    input_digests.ROWS,
)
_FREE: Final = ("data.pad_to",)
"""What may change below these: a row's padding says nothing about which rows come."""
_NOT_COMPARED: Final = ("checkpoint.resume", "checkpoint.accept_changes", "config_format")
"""The only settings that are not compared: they say how a run is resumed or recorded, and nothing about the run."""
_PARTS: Final = 8  # parts of a setting that are shown
_LONGEST: Final = 200  # characters of a value in a message


def settings(config: Config, bridge: AutoBridge | None, data: DataModule) -> dict[str, Any]:
    """Returns all settings and the digests of inputs by dotted name, for a native checkpoint. Collective.

    Secrets are left out; values from the environment are replaced by a short digest.
    """
    values = on_rank_zero("collecting the settings", lambda: _open(config))
    values["parallel"] = str(process_groups.running())
    return values | data.decided() | input_digests.found(config, bridge, data)


def changes(saved: Mapping[str, Any], current: Mapping[str, Any], *, accepted: Sequence[str] = ()) -> list[str]:
    """Returns a line for each setting that has changed; raises ConfigError for changes that are not allowed or `accepted`.

    If a setting that determines the order of the data is accepted, the run continues after the number of samples that it has seen.
    An empty `saved` is that of a model that was converted and never trained.
    """
    if unknown := [name for name in accepted if name not in _FIXED]:
        raise ConfigError(f"checkpoint.accept_changes={unknown} must be of {', '.join(_FIXED)}; others need not be accepted.")
    names = [name for name in {**current, **saved} if name not in _NOT_COMPARED] if saved else []
    lines = {name: _line(name, saved, current) for name in names if _text(saved, name) != _text(current, name)}
    forbidden = [line for name, line in lines.items() if (fixed := _fixed(name)) is not None and fixed not in accepted]
    if forbidden:
        others = [line for line in lines.values() if line not in forbidden]
        raise ConfigError(
            "a run can't continue with other data, another tokenizer, another model or other adapters; put these back, or name "
            f"them in checkpoint.accept_changes ({', '.join(_FIXED)}):\n  "
            + "\n  ".join(forbidden)
            + ("\nThese have changed as well, which is allowed:\n  " + "\n  ".join(others) if others else "")
        )
    return list(lines.values())


def _fixed(name: str) -> str | None:
    """The name in _FIXED that includes the setting `name`, or None."""
    if name in _FREE:
        return None
    return next((fixed for fixed in _FIXED if name == fixed or name.startswith(f"{fixed}.")), None)


def _line(name: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Which parts of a setting differ, and how."""
    if name in saved and name in current:
        parts = [(part, {part: old}, {part: new}) for part, old, new in differences(saved[name], current[name], name)]
    else:
        parts = [(name, dict(saved), dict(current))]
    return "; ".join(f"{part}: {_shown(old, part)} -> {_shown(new, part)}" for part, old, new in parts[:_PARTS]) + (
        f"; and {len(parts) - _PARTS} more" if len(parts) > _PARTS else ""
    )


def _shown(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    text = plain(value if isinstance(value, str) else _text(values, name))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _text(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], sort_keys=True, default=str) if name in values else "not set"


def _open(config: Config) -> dict[str, Any]:
    """The settings of a run without secrets, by dotted name; config.yaml in run_dir shows which come from the environment."""
    values = dataclasses.asdict(config)
    own, written = _flat(redaction.redacted(values, values)), _flat(redaction.written(Path(config.run_dir)))
    out = {}
    for name, value in _flat(values).items():
        text = str(written.get(name, ""))
        if own[name] != value:
            out[name] = own[name]
        elif redaction.REDACTED in text or "${oc.env" in text:
            # 16 bits of its digest: enough to notice a change, and too few to guess the value.
            out[name] = f"{redaction.REDACTED} {sha256(_text({name: value}, name).encode()).hexdigest()[:4]}"
        else:
            out[name] = json.loads(_text({name: value}, name))
    return out


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to dotted names; a list or an empty group is a value."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value
    return out
