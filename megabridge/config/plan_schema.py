"""The schema of the group `plan`, as megabridge.config.schema has the others. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FiguresConfig:
    """Figures of a device in the place of those that megabridge/layouts/devices.yaml has. Null: these."""

    memory_gib: float | None = None
    """GiB of a device."""
    tflops_16bit: float | None = None
    """10^12 dense matrix operations a second in bfloat16 or float16."""
    tflops_32bit: float | None = None
    """10^12 dense matrix operations a second in float32."""
    memory_gbs: float | None = None
    """GB/s of a device's memory."""
    inside_gbs: float | None = None
    """GB/s one way between two devices of a host."""
    between_gbs: float | None = None
    """GB/s one way from one device to other hosts."""
    per_host: int | None = None
    """Devices of a host."""


@dataclass
class PlanConfig:
    gpus: int | None = None
    """Devices that recipe=plan and parallel=auto choose a layout for. Null: parallel=auto takes what this host has or what torchrun
    or srun started, recipe=plan looks at the layout of `parallel` alone."""
    device: str | None = None
    """Which: a name in megabridge/layouts/devices.yaml, h100, h200, a100, b200 or cpu. Null: this host's."""
    figures: FiguresConfig = field(default_factory=FiguresConfig)
    """Your own figures of the device."""
    usable: float = 0.92
    """Share of a device's memory that the expected one may fill; kernels, communication and fragments need the rest."""
    show: int = 10
    """Layouts in recipe=plan's table, best first. plan.json has ten times as many."""
    traced: int = 3
    """The best layouts whose memory is traced, as it is for one layout, and not only estimated."""
    storage_gbs: float = 5.0
    """GB/s that a host reads from or writes to the storage of checkpoints."""
    storage_total_gbs: float | None = None
    """GB/s of that storage for all hosts together. Null: no limit."""
    arguments: list[str] = field(default_factory=list)
    """Overrides that recipe=plan repeats in the commands that it prints; the command fills in its own."""
