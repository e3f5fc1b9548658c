"""What a layout is chosen for."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pytest

from megabridge.config.plan_schema import FiguresConfig, PlanConfig
from megabridge.errors import ConfigError
from megabridge.layouts import devices
from megabridge.layouts.devices import Device
from megabridge.parallel import hardware


def test_every_figure_is_there_and_has_its_source() -> None:
    names = {each.name for each in fields(Device)} - {"name"}
    assert names == {each.name for each in fields(FiguresConfig)}, "each may be one's own"
    lines = Path(devices.__file__).with_name("devices.yaml").read_text().splitlines()
    for name, figures in devices.known().items():
        assert set(figures) == names | {"names"}, name
        assert all(figures[each] > 0 for each in names)
    figures_lines = [line for line in lines if line.startswith("  ") and not line.startswith("  names")]
    assert len(figures_lines) == len(names) * len(devices.known())
    assert all(len(line.partition("#")[2].strip()) > 5 for line in figures_lines)


def test_a_device_is_known_by_its_name() -> None:
    for name in ("h100", "h200", "a100", "b200"):
        assert devices.called(f"NVIDIA {name.upper()} 80GB HBM3").name == name
    with pytest.raises(ConfigError, match="nothing is known of this host's NVIDIA L40S; name the device"):
        devices.called("NVIDIA L40S")


def test_a_plan_says_what_it_is_for_or_it_is_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    found = devices.machine(
        PlanConfig(gpus=64, device="h200", figures=FiguresConfig(memory_gib=100.0, per_host=4)), platform="auto"
    )
    assert found.count == 64
    assert asdict(found.device) == {**asdict(devices.device("h200")), "memory_gib": 100.0, "per_host": 4}
    monkeypatch.setattr(hardware, "visible_gpus", lambda: 4)
    monkeypatch.setattr(hardware, "gpu_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(hardware, "cores", lambda: 16)
    monkeypatch.setattr(hardware, "memory_bytes", lambda: 64 << 30)
    here = devices.machine(PlanConfig(), platform="auto")
    assert (here.count, here.device.name, here.device.per_host) == (4, "a100", 4)
    assert devices.machine(PlanConfig(), platform="auto", started=32).count == 32
    core = devices.device("cpu")
    for plan, started, count in ((PlanConfig(), None, 16), (PlanConfig(gpus=2), None, 2), (PlanConfig(), 8, 8)):
        cpu = devices.machine(plan, platform="cpu", started=started)
        assert cpu.count == cpu.device.per_host == count and cpu.device.memory_gib == pytest.approx(64 / count)
        assert cpu.device.tflops_32bit == pytest.approx(core.tflops_32bit * 16 / count), "processes share the cores"
    monkeypatch.setattr(hardware, "visible_gpus", lambda: 0)
    with pytest.raises(ConfigError, match=r"give plan\.gpus=8"):
        devices.machine(PlanConfig(device="h100"), platform="auto")
    with pytest.raises(ConfigError, match=r"plan\.device=h1000 must be one of h100"):
        devices.machine(PlanConfig(device="h1000"), platform="auto")
