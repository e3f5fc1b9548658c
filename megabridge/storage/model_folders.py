"""Local folders of Hugging Face models, and what only looks like one. No torch: the command asks before it starts ranks."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from megabridge.errors import CheckpointError
from megabridge.storage import regular_files

QUICKSTART: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that also comes from a package, where there is no hub (megabridge.hf.quickstart)."""
UNKNOWN: Final = "neither a local folder nor a model on the hub"
_HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def local(path: str | Path) -> Path | None:
    """The local folder that `path` names; None for a hub id. Raises CheckpointError for what is neither."""
    name, place = str(path), regular_files.expand(path)
    if name and place.exists():
        return _checked(place)
    if _is_path(name) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name!r} must be an existing folder, or a hub id such as org/name{nearest(place)}.")
    return None


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} must be a folder with a Hugging Face model, not a file; name the folder that it lies in.")
    return with_config(folder)


def with_config(folder: Path) -> Path:
    """`folder`. Raises CheckpointError where no config.json is in it."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder} holds PEFT's adapters, not a model: give the model that they were trained beside as model.path, and "
                "this folder as peft.path with peft=lora."
            )
        if any((folder / place / ".metadata").is_file() for place in (".", "native")):
            raise CheckpointError(
                f"{folder} is a native checkpoint, not a Hugging Face model: continue from it with checkpoint.resume={folder}, or "
                "export it with recipe=convert conversion.mode=export."
            )
        inside = sorted(entry.name for entry in folder.iterdir())
        below = next((entry for entry in sorted(folder.glob("*/config.json"))), None)
        hint = f"; {below.parent} has one" if below else f"; it holds {', '.join(inside[:8]) or 'nothing'}"
        raise CheckpointError(f"{folder} must hold a config.json to be a Hugging Face model{hint}.")
    return folder


def nearest(place: Path) -> str:
    """A hint at a folder beside `place` that is spelled nearly the same, or nothing."""
    if not place.parent.is_dir():
        return ""
    close = get_close_matches(place.name, [entry.name for entry in place.parent.iterdir() if entry.is_dir()], n=1)
    return f"; is {place.parent / close[0]} meant?" if close else ""


def is_cached(hub_id: str, kind: str = "model") -> bool:
    """Whether the hub's cache on this host has a folder of it."""
    return (cache() / f"{kind}s--{hub_id.replace('/', '--')}").is_dir()


def cache() -> Path:
    """The hub's cache on this host."""
    return Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or _home() / "hub").expanduser()


def has_token() -> bool:
    """Whether this user has a token of the hub."""
    return bool(os.environ.get("HF_TOKEN")) or regular_files.exists(Path(os.environ.get("HF_TOKEN_PATH", _home() / "token")))


def endpoint() -> str:
    """The hub's address, without a slash at its end."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    """Whether this user wants the hub not to be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _home() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()


def _is_path(name: str) -> bool:
    """Whether `name` can only mean a local path."""
    return name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1
