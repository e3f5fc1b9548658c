"""Setup of one-call conversions: process groups for the length of a call, parameters in a file, layout keywords."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import megabridge.platform as platform
from megabridge.errors import CheckpointError, ConfigError
from megabridge.models.provider import ModelProvider
from megabridge.parallel import collectives, process_groups
from megabridge.parallel.topology import SETTINGS
from megabridge.platform.file_backed import file_backed
from megabridge.storage import regular_files


@contextlib.contextmanager
def borrowed_groups(provider: ModelProvider) -> Iterator[None]:
    """Runs a block in the process groups of `provider`'s layout, and stops them at its end if it started them.

    torch's own group is stopped only in a single process. Every rank enters it.
    """
    running = process_groups.current()
    try:
        provider.start_groups()
        yield
    finally:
        if running is None:
            process_groups.stop(for_good=False)


@contextlib.contextmanager
def scratch(folder: str | Path | None) -> Iterator[Path]:
    """Yields `folder`, or a path in a temporary folder that is removed at the end. Every rank enters it."""
    if folder is not None:
        yield Path(folder)
        return
    made = collectives.on_rank_zero("making a folder", lambda: tempfile.mkdtemp(prefix="megabridge-"))
    try:
        yield Path(made, "export")
    finally:
        if collectives.rank() == 0:
            shutil.rmtree(made, ignore_errors=True)


def arrange(provider: ModelProvider, settings: Mapping[str, Any]) -> None:
    """Sets attributes of `provider`, named as its own or by the short names of `SETTINGS`.

    If no size is given, the sizes are those of the running process groups, if any. Raises ConfigError for a size that is given
    under both names, and for an unknown name.
    """
    doubled = sorted(f"{short} and {name}" for short, name in SETTINGS.items() if short in settings and name in settings)
    if doubled:
        raise ConfigError(f"a size must be given once, not as {doubled[0]}; leave one out.")
    named = {SETTINGS.get(name, name): value for name, value in settings.items()}
    running = process_groups.current()
    if running is not None and not named.keys() & set(SETTINGS.values()):
        named |= running.settings()
    for name, value in named.items():
        if name == SETTINGS["vpp"] and value == 1:
            value = None
        if name != SETTINGS["etp"] or value is not None:
            setattr(provider, name, value)


def target(path: str | Path, *, replace: bool) -> Path:
    """Returns the absolute path of a folder to publish, and creates its parent. Every rank calls it.

    Without `replace`, raises CheckpointError on every rank unless the folder is missing or empty; an empty one is removed.
    """
    folder = regular_files.expand(path).absolute()

    def prepare() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if replace or not folder.exists():
            return
        if not folder.is_dir() or any(folder.iterdir()):
            raise CheckpointError(f"{folder} must not exist, or be an empty folder; remove it or name another.")
        folder.rmdir()

    collectives.on_rank_zero("preparing a folder", prepare)
    return folder


def provide_unfilled(provider: ModelProvider, folder: Path, device_map: str, *, runs: bool = False) -> list[torch.nn.Module]:
    """Builds the model's chunks without values: on the CPU in an unlinked file in `folder`, unless `device_map` says cuda.

    Memory beside the file doesn't grow with the model. Parameters have the dtypes that the provider's hooks give them; with `runs`
    they are cast to those that a model runs in. Every rank calls it.
    """
    if device_map.startswith("cuda"):
        return provider.provide_distributed_model(wrap_with_ddp=False, init="empty", runs=runs)
    if not platform.is_cpu():
        provider.use_cpu_initialization = True
    with file_backed(folder):
        return provider.provide_distributed_model(wrap_with_ddp=False, init="empty", runs=runs)


def check_device_map(device_map: str | None) -> str:
    """Returns `device_map`, or auto for None. Raises ConfigError unless it is auto, cpu or cuda[:n], and available here."""
    name = "auto" if device_map is None else str(device_map)
    kind, _, number = name.partition(":")
    if name not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise ConfigError(
            f"device_map={device_map!r} must be 'auto', 'cpu', 'cuda' or 'cuda:<n>'; a model is spread over devices by its layout, "
            "e.g. tensor_model_parallel_size=2."
        )
    if kind == "cuda" and platform.is_cpu():
        raise ConfigError(
            f"device_map={name!r} needs a CUDA device, but this process works on the CPU; use 'auto' or 'cpu', or set "
            "MEGABRIDGE_PLATFORM=cuda where there is one."
        )
    if number and int(number) >= torch.cuda.device_count():
        raise ConfigError(f"device_map={name!r} must name one of this process's {torch.cuda.device_count()} CUDA devices.")
    return name


def follow_device_map(provider: ModelProvider, device_map: str) -> None:
    """Makes `provider` build its parameters on the device of a checked `device_map`."""
    if device_map == "cpu" and not platform.is_cpu():
        provider.use_cpu_initialization = True
    if ":" in device_map:
        device = torch.device(device_map)
        if process_groups.world_size() > 1 and device.index != torch.cuda.current_device():
            raise ConfigError(
                f"device_map={device_map!r} must be 'cuda' with {process_groups.world_size()} processes; each uses its own device."
            )
        torch.cuda.set_device(device)
