"""Files of a queued point: point.json says what its ranks run, rank-N.json how each ended. No torch.

point.json holds no secrets: their values are passed in the job's environment, under names that the file holds instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf

from megabridge.config import redaction
from megabridge.errors import MegabridgeError
from megabridge.launchers.processes.outcome import Outcome, decoded, encoded
from megabridge.storage import atomic_files

FILE: Final = "point.json"
STOPPED: Final = "stopped"
"""File that rank 0 creates in the point's folder if a signal stopped the run after a save."""
OUTPUT: Final = "output.log"
_HIDDEN: Final = "$environment"


def write(folder: Path, *, values: Mapping[str, Any], cfg: DictConfig, platform: str) -> dict[str, str]:
    """Writes point.json in `folder`; returns the environment variables with its secrets. `cfg` is the unresolved `values`."""
    secrets: dict[str, str] = {}
    open_values = redaction.redacted(OmegaConf.to_container(cfg, resolve=False), values)
    content = {"platform": platform, "values": _hidden(values, open_values, secrets)}
    leave_text(folder / FILE, json.dumps(content, indent=1) + "\n")
    return secrets


def read(folder: Path, environ: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Reads the resolved config and the platform. Raises MegabridgeError where `environ` lacks a secret or the file is missing."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        values: dict[str, Any] = _shown(content["values"], environ)
        return values, content["platform"]
    except (OSError, ValueError, TypeError) as error:
        raise MegabridgeError(f"{folder / FILE} must say what the point runs: {error}; submit the sweep again.") from error
    except KeyError as error:
        raise MegabridgeError(f"{error.args[0]} is not in the job's environment; submit without --export=NONE.") from error


def leave_text(file: Path, text: str) -> None:
    """Writes a file for the queue's jobs. Raises MegabridgeError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write(file, text)
    except OSError as error:
        raise MegabridgeError(f"{file} can't be written ({error.strerror}); set another hydra.sweep.dir.") from error


def rank_file(folder: Path, rank: int) -> Path:
    """The file for the outcome of `rank`."""
    return folder / f"rank-{rank}.json"


def leave(folder: Path, rank: int, outcome: Outcome) -> None:
    """Writes a rank's outcome atomically. Raises OSError."""
    atomic_files.write(rank_file(folder, rank), encoded(outcome))


def outcomes(folder: Path, world_size: int) -> dict[int, Outcome]:
    """Reads the outcomes that ranks have written so far. A file that can't be read (yet) counts as missing."""
    found = {}
    for rank in range(world_size):
        file = rank_file(folder, rank)
        if file.is_file() and (outcome := decoded(file.read_bytes())) is not None:
            found[rank] = outcome
    return found


def _hidden(value: Any, shown: Any, secrets: dict[str, str]) -> Any:
    """Returns `value` with the values that differ from `shown` moved to `secrets`."""
    if isinstance(value, Mapping):
        return {key: _hidden(each, shown[key], secrets) for key, each in value.items()}
    if isinstance(value, list):
        return [_hidden(each, other, secrets) for each, other in zip(value, shown, strict=True)]
    if value == shown:
        return value
    text = json.dumps(value)
    name = redaction.CARRIED + sha256(text.encode()).hexdigest()[:16].upper()
    secrets[name] = text
    return {_HIDDEN: name}


def _shown(value: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_HIDDEN}:
            return json.loads(environ[value[_HIDDEN]])
        return {key: _shown(each, environ) for key, each in value.items()}
    if isinstance(value, list):
        return [_shown(each, environ) for each in value]
    return value
