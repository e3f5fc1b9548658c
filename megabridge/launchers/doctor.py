"""`megabridge doctor`: what is installed and reachable here, and the remedy of each gap. No torch: a child process asks it.

Exit status 0 where nothing keeps runs from working, else 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement

from megabridge.config import installed, optional_packages
from megabridge.parallel import hardware
from megabridge.storage import disk_room, model_folders
from megabridge.version import VERSION

_LEAST_PYTHON: Final = (3, 12)
_LEAST_DISK: Final = 10 * 10**9
_LEAST_SHARED: Final = 1 << 30
_LEAST_FILES: Final = 4096
_HUB_SECONDS: Final = 3.0
_TORCH_SECONDS: Final = 120.0
_PROBE: Final = """
import json, torch
cuda = torch.cuda.is_available()
found = {"version": torch.__version__, "cuda": torch.version.cuda, "available": cuda}
found["gloo"] = torch.distributed.is_available() and torch.distributed.is_gloo_available()
found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None
found["devices"] = []
for number in range(torch.cuda.device_count() if cuda else 0):
    own = torch.cuda.get_device_properties(number)
    found["devices"].append([own.name, own.total_memory, own.major, own.minor])
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found. A `gap` keeps runs from working; `remedy` is what to do about it, or a hint."""

    what: str
    said: str
    remedy: str = ""
    gap: bool = False


def main() -> int:
    """Prints the findings as they come; the exit status."""
    gaps = 0
    for finding in _findings():
        mark = "GAP " if finding.gap else "note" if finding.remedy else "ok  "
        print(f"{mark} {finding.what:<14} {finding.said}", flush=True)
        if finding.remedy:
            print(f"{'':19} -> {finding.remedy}", flush=True)
        gaps += finding.gap
    print(f"{gaps} gap{'s' if gaps != 1 else ''}: {'see -> above' if gaps else 'runs can start here'}", flush=True)
    return int(gaps > 0)


def _findings() -> Iterator[Finding]:
    yield Finding("megabridge", f"{VERSION} in {Path(__file__).parents[1]}")
    yield _python()
    yield from _packages()
    probe = _torch()
    yield from _devices(probe)
    yield from _backends(probe)
    yield from _hub()
    yield from _disks()
    yield from _limits()


def _python() -> Finding:
    text = f"{platform.python_version()} ({sys.executable})"
    old = sys.version_info[:2] < _LEAST_PYTHON
    return Finding(
        "python", text, "install Python 3.12 or newer, and make the environment anew (docs/install.md)" if old else "", old
    )


def _packages() -> Iterator[Finding]:
    """Those that megabridge requires, in the versions that it asks for, and the optional ones."""
    try:
        needed = [Requirement(text) for text in requires("megabridge") or ()]
    except PackageNotFoundError:
        yield Finding(
            "packages", "megabridge is not installed", "pip install -e . in its checkout, so that its requirements are known"
        )
        needed = []
    for each in needed:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        found = _version(each.name)
        if found is None:
            yield Finding(each.name, "not installed", f"pip install '{each.name}{each.specifier}'", gap=True)
        elif not each.specifier.contains(found, prereleases=True):
            yield Finding(each.name, f"{found}, not {each.specifier}", f"pip install '{each.name}{each.specifier}'", gap=True)
        else:
            yield Finding(each.name, found)
    for extra in optional_packages.EXTRAS.values():
        if _version(extra.module) is None and not extra.is_installed():
            yield Finding(extra.module, f"not installed: {extra.purpose}", f"if you want that: {extra.install}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch() -> dict[str, Any] | str:
    """What torch says in a process of its own, or why it can't."""
    command = [sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TORCH_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"importing it took more than {_TORCH_SECONDS:.0f} s"
    except OSError as error:
        return f"no process can be started ({error.strerror})"
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    except (ValueError, IndexError):
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _devices(probe: dict[str, Any] | str) -> Iterator[Finding]:
    gpus = hardware.visible_gpus()
    yield Finding("cpu", f"{hardware.cores()} cores, {hardware.memory_bytes() / 2**30:.0f} GiB of memory")
    if isinstance(probe, str):
        yield Finding("torch", f"can't be imported: {probe}", "install it again for this Python (docs/install.md)", gap=True)
        return
    if not probe["gloo"]:
        yield Finding("gloo", "this torch has none", "install a torch with gloo: ranks on a CPU meet by it", gap=True)
    for name, memory, major, minor in probe["devices"]:
        yield Finding("gpu", f"{name}, {memory / 2**30:.0f} GiB, compute capability {major}.{minor}")
    if probe["available"]:
        lacks = probe["nccl"] is None
        yield Finding("nccl", probe["nccl"] or "this torch has none", "install a torch with NCCL" if lacks else "", gap=lacks)
    elif gpus:
        remedy = "install a torch for CUDA, and a driver that is new enough for it (nvidia-smi says which CUDA it has)"
        built = f"is for CUDA {probe['cuda']}" if probe["cuda"] else "is for CPUs only"
        yield Finding("gpu", f"{gpus} here, which torch {probe['version']} can't use: it {built}", remedy, gap=True)
    else:
        hidden = hardware.installed_gpus() and "all hidden by CUDA_VISIBLE_DEVICES"
        yield Finding("gpu", str(hidden or "none: runs compute on the CPU"))


def _backends(probe: dict[str, Any] | str) -> Iterator[Finding]:
    has_te = optional_packages.is_installed("transformer_engine")
    is_cuda = not isinstance(probe, str) and bool(probe["available"])
    usable = [name for name in installed.OURS if name != "te" or (has_te and is_cuda)]
    yield Finding("backends", f"{', '.join([*usable, *installed.backends()])}; auto is {'te' if 'te' in usable else 'torch'}")


def _hub() -> Iterator[Finding]:
    token = "a token is there" if model_folders.has_token() else "no token, so no gated or private models"
    endpoint = model_folders.endpoint()
    if model_folders.is_offline():
        yield Finding("hub", f"HF_HUB_OFFLINE is set: only what {model_folders.cache()} holds; {token}")
        return
    problem = _unreachable(endpoint)
    if problem:
        remedy = f"models that aren't in {model_folders.cache()} can't be fetched: check the network, a proxy, and HF_ENDPOINT"
        yield Finding("hub", f"{endpoint} can't be reached ({problem}); {token}", remedy)
    else:
        yield Finding("hub", f"{endpoint} answers; {token}", "" if model_folders.has_token() else "hf auth login, or set HF_TOKEN")


def _unreachable(endpoint: str) -> str:
    """Why the hub doesn't answer; "" where it does."""
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # an answer, too
            urllib.request.urlopen(f"{endpoint}/api/models?limit=1", timeout=_HUB_SECONDS).close()
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        return "no answer in time" if isinstance(reason, TimeoutError | socket.timeout) else str(reason)
    return ""


def _disks() -> Iterator[Finding]:
    for what, folder, remedy in (
        (
            "runs' disk",
            Path.cwd() / "outputs",
            "free some, or set run_dir=<folder on another disk> (checkpoint.path for saves alone)",
        ),
        ("hub's cache", model_folders.cache(), "free some, or set HF_HOME to a folder on another disk"),
    ):
        free = disk_room.free_bytes(folder)
        place = next(each for each in (folder, *folder.parents) if each.exists())
        short = not os.access(place, os.W_OK)
        said = f"{folder}: {disk_room.size(free)} free" + (f", but {place} can't be written" if short else "")
        yield Finding(what, said, remedy if short or free < _LEAST_DISK else "", gap=short or free < _LEAST_DISK // 10)


def _limits() -> Iterator[Finding]:
    with contextlib.suppress(OSError):
        size = shutil.disk_usage("/dev/shm").total
        small = size < _LEAST_SHARED
        remedy = "start the container with --shm-size=8g or --ipc=host: NCCL and shared reads use it" if small else ""
        yield Finding("/dev/shm", disk_room.size(size), remedy, gap=size < _LEAST_SHARED // 16)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < _LEAST_FILES
    remedy = f"ulimit -n {max(_LEAST_FILES, min(hard, 65536)) if hard > 0 else 65536}" if few else ""
    yield Finding("open files", f"at most {soft}", remedy, gap=soft < _LEAST_FILES // 8)
