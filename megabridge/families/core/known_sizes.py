"""Native settings of a run's model, as far as they are known without a download, ranks or torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megabridge.config.schema import ModelConfig
from megabridge.errors import CheckpointError, ConfigError
from megabridge.families.core.registry import family_for, own_families
from megabridge.storage import regular_files


def known_sizes(model: ModelConfig) -> Mapping[str, Any]:
    """Returns the native settings of `model.hf`, or of the config.json in a local `model.path`; empty if they aren't known.

    They aren't for a hub id without a YAML of its own, a family of another package, and a config that the family refuses, which the
    ranks report. Raises ConfigError if `model.path` is a local folder whose config.json can't be read.
    """
    hf = model.hf or _of_folder(model.path)
    try:
        return family_for(hf, among=own_families()).sizes(hf)
    except ConfigError:
        return {}


def _of_folder(path: str | None) -> Mapping[str, Any]:
    if path is None or not regular_files.is_folder(Path(path)) or not os.path.lexists(Path(path) / "config.json"):
        return {}
    file = Path(path) / "config.json"
    try:
        content = json.loads(regular_files.read_text(file))
    except (CheckpointError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.path={path} must hold a readable config.json: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, not {type(content).__name__}.")
    return content
