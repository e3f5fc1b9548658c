"""Devices that a layout is chosen for: their number, and the figures of one. devices.yaml has those of known ones. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from megabridge.config.plan_schema import FiguresConfig, PlanConfig
from megabridge.errors import ConfigError
from megabridge.parallel import hardware

CPU: Final = "cpu"
_FILE: Final = Path(__file__).with_name("devices.yaml")


@dataclass(frozen=True)
class Device:
    """Figures of one device. GB/s are 10^9 bytes a second, TFLOP/s 10^12 operations of dense matrices."""

    name: str
    memory_gib: float
    tflops_16bit: float
    tflops_32bit: float
    memory_gbs: float
    inside_gbs: float
    """One way, between two devices of a host."""
    between_gbs: float
    """One way, from one device to other hosts."""
    per_host: int

    def with_figures(self, figures: FiguresConfig) -> Device:
        """This device with the figures that a user gives."""
        given = {each.name: value for each in fields(figures) if (value := getattr(figures, each.name)) is not None}
        return replace(self, **given)


@dataclass(frozen=True)
class Machine:
    """`count` devices, each of which runs a process."""

    count: int
    device: Device


@cache
def known() -> Mapping[str, Mapping[str, Any]]:
    """Returns the content of devices.yaml, by name."""
    content: Any = OmegaConf.to_container(OmegaConf.load(_FILE))
    figures: Mapping[str, Mapping[str, Any]] = content
    return figures


def device(name: str) -> Device:
    """Returns the device of this name in devices.yaml. Raises ConfigError for another."""
    if name not in known():
        raise ConfigError(f"plan.device={name} must be one of {', '.join(known())}; others are one of these with plan.figures.")
    return Device(name=name, **{key: value for key, value in known()[name].items() if key != "names"})


def called(gpu: str) -> Device:
    """Returns the device that CUDA calls `gpu`. Raises ConfigError for one that isn't in devices.yaml."""
    for name, figures in known().items():
        if any(part in gpu for part in figures["names"]):
            return device(name)
    raise ConfigError(
        f"nothing is known of this host's {gpu or 'GPU'}; name the device that is most like it, as plan.device=a100, and its own "
        "figures, as plan.figures.memory_gib=48."
    )


def machine(plan: PlanConfig, *, platform: str, started: int | None = None) -> Machine:
    """Returns the devices of a run: those that `plan` names, else those of this host.

    `platform` is a run's, cpu, cuda or auto; `started` counts the processes that torchrun or srun started. On a CPU there is a
    process for each core, and they share cores and memory. Raises ConfigError.
    """
    gpus = 0 if platform == CPU else hardware.visible_gpus()
    count = plan.gpus or started or gpus
    if plan.device is not None:
        found = device(plan.device)
        count = count or (hardware.cores() if found.name == CPU else 0)
    elif gpus:
        found = replace(called(hardware.gpu_name()), per_host=gpus)
    else:
        found, count = _this_cpu(plan.gpus or started or hardware.cores())
    if not count:
        raise ConfigError(f"plan.device={plan.device} needs the number of devices where this host has none; give plan.gpus=8.")
    return Machine(count, found.with_figures(plan.figures))


def _this_cpu(count: int) -> tuple[Device, int]:
    """Returns the share of this host's CPU that each of `count` processes has."""
    core, cores = device(CPU), hardware.cores() / count
    share = replace(
        core,
        memory_gib=hardware.memory_bytes() / 2**30 / count,
        tflops_16bit=core.tflops_16bit * cores,
        tflops_32bit=core.tflops_32bit * cores,
        memory_gbs=core.memory_gbs * cores,
        per_host=count,
    )
    return share, count
