"""What the command looks up before it starts a rank, so that what can't work is told at once: files, packages, what a resume means.

No torch. The ranks look again: files may go, and what needs a download they see first.
"""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from megabridge.config import layout_rules, optional_packages, readers
from megabridge.config.schema import Config
from megabridge.errors import ConfigError, MegabridgeError, listed
from megabridge.launchers import sweep
from megabridge.storage import data_files, model_folders, regular_files, steps

_TIMEOUT: Final = 1.0
"""Seconds that the hub has to say that it knows a name. Whoever fetches it waits longer."""
_SWEEPS: Final = ("collect", "report")
_WITHOUT_MODEL: Final = (*_SWEEPS, "bench")


def check(config: Config, *, platform: str, asks_hub: bool = False) -> None:
    """Raises ConfigError for everything that the run names and that isn't there.

    `asks_hub`: whether names that are no local folders are looked up on the hub.
    """
    recipe, problems = readers.recipe_name(config), list[str]()

    def add(look: Callable[[], object]) -> None:
        try:
            look()
        except MegabridgeError as error:
            problems.append(str(error))

    if recipe in _SWEEPS:
        add(lambda: sweep_folder(config))
    if recipe is not None and recipe not in _WITHOUT_MODEL:
        asks = asks_hub and not config.recipe.single_process
        add(lambda: _model(config, asks_hub=asks))
    if recipe in (*readers.TRAINING, "show_data"):
        for look in _data(config.data, asks_hub=asks_hub):
            add(look)
    if not config.recipe.single_process:
        add(lambda: _backend(config, platform))
    if recipe in readers.TRAINING:
        saving = config.checkpoint
        places = steps.places(Path(config.run_dir), saving.path, saving.spare_path)
        add(lambda: steps.source(saving.resume, config.recipe.steps, places))
    if config.peft.name != "none" and config.peft.path is not None and recipe is not None:
        add(lambda: _adapter(str(config.peft.path)))
    if problems:
        raise ConfigError(listed(list(dict.fromkeys(problems))))


def sweep_folder(config: Config) -> Path:
    """The directory that sweep=DIR names. Raises MegabridgeError where it is none of a sweep."""
    if config.sweep is None:
        raise ConfigError("this recipe needs the directory of a sweep; give sweep=multirun/DATE/TIME.")
    folder = Path(config.sweep).absolute()
    sweep.read(folder)
    return folder


def _model(config: Config, *, asks_hub: bool) -> None:
    path = config.model.path
    if path in (None, model_folders.QUICKSTART) or model_folders.local(path) is not None or model_folders.is_cached(path):
        return
    if asks_hub and _is_unknown("models", path):
        near = model_folders.nearest(Path(path).expanduser())
        raise ConfigError(
            f"model.path={path} is {model_folders.UNKNOWN}{near}; check the spelling, or set HF_TOKEN if it is private."
        )


def _data(node: dict[str, Any], *, asks_hub: bool) -> Iterator[Callable[[], object]]:
    """A look at each place that a data module of ours reads from."""
    kind = str(node.get("_target_")).removeprefix("megabridge.data.")
    if kind in ("finetuning.Finetuning", "streaming.StreamedText"):
        for key in ("path", "validation_path"):
            if isinstance(path := node.get(key), str):
                yield lambda path=path, key=key: _rows(key, path, asks_hub=asks_hub)  # type: ignore[misc]
    if kind == "pretraining.IndexedTokens":
        paths = node.get("paths")
        for prefix in paths if isinstance(paths, list) else [paths]:
            if isinstance(prefix, str):
                yield lambda prefix=prefix: data_files.check_indexed(prefix)  # type: ignore[misc]


def _rows(key: str, path: str, *, asks_hub: bool) -> None:
    try:
        is_local = data_files.local_files(path) is not None or regular_files.is_folder(regular_files.expand(path))
    except ConfigError as error:
        raise ConfigError(f"data.{key}: {error}") from error
    if not is_local and asks_hub and not model_folders.is_cached(path, "dataset") and _is_unknown("datasets", path):
        raise ConfigError(f"data.{key}={path} is neither a local file or folder nor a data set on the hub; check the spelling.")


def _backend(config: Config, platform: str) -> None:
    if layout_rules.backend_of_run(config) != "te":
        return
    extra = optional_packages.EXTRAS["transformer_engine"]
    if not extra.is_installed():
        raise ConfigError(f"{extra.missing}; or use backend=torch.")
    if platform == "cpu":
        raise ConfigError("backend=te runs on CUDA only; use backend=torch.")


def _adapter(path: str) -> None:
    if not regular_files.is_folder(regular_files.expand(path)):
        raise ConfigError(f"peft.path={path} must be a folder with adapters; check the path.")


def _is_unknown(kind: str, name: str) -> bool:
    """Whether the hub answers that it has nothing of this name. False where it doesn't answer at once."""
    if model_folders.is_offline():
        return False
    request = urllib.request.Request(f"{model_folders.endpoint()}/api/{kind}/{quote(name)}")
    if token := os.environ.get("HF_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    with contextlib.suppress(OSError, ValueError, HTTPException):
        try:
            urllib.request.urlopen(request, timeout=_TIMEOUT).close()
        except urllib.error.HTTPError as error:
            return error.code == 404 or (error.code == 401 and not model_folders.has_token())
    return False
