"""Detects this host's GPUs, cores and memory, without torch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path


def installed_gpus() -> int:
    """Number of NVIDIA GPUs of this host, from the driver's NVML library, or counted in /dev where that is missing."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0:
        return 0
    try:
        return count.value if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 else 0
    finally:
        nvml.nvmlShutdown()


def visible_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """Number of GPUs that a process with `environ` sees: CUDA_VISIBLE_DEVICES as CUDA reads it, up to the first bad entry."""
    installed = installed_gpus()
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or installed == 0:
        return installed
    count = 0
    for entry in (part.strip() for part in chosen.split(",")):
        if not (entry.startswith(("GPU-", "MIG-")) or (entry.isdecimal() and int(entry) < installed)):
            break
        count += 1
    return count


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Physical memory of this host in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
