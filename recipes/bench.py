"""Measures conversion against its peers in one run: recipe=bench bench=conversion model=llama32_1b.

Random weights of the model's shape are written once; then each layout of `bench.layouts` imports and exports them in its own ranks
(recipes/bench_ranks.py). Prints a table and writes bench.json to the run directory. Needs disk space for two copies of the model.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import megabridge.platform as platform
from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config import validation
from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.families.core.known_sizes import known_sizes
from megabridge.hf import assets
from megabridge.launchers import local
from megabridge.loggers import Reporter
from megabridge.parallel import hardware
from megabridge.parallel.topology import Topology
from megabridge.training import build

# measurement, its peer, and the minimum ratio of their speeds that we aim at (None: only reported)
RATIOS = (
    ("import", "plain copy", 0.9),
    ("import", "from_pretrained", None),
    ("import", "import of whole tensors", None),
    ("export", "plain write", 0.85),
    ("export", "save_pretrained", 1.3),
    ("export", "export of whole tensors", None),
)


def main(config: Config) -> None:
    """One process calls it, without process groups."""
    run_dir = Path(config.run_dir)
    with Reporter(config, build.loggers(config)) as report:
        source, narrow = write_configs(config, run_dir)
        results: dict[str, Any] = {}
        for layout in map(Topology.parse, config.bench.layouts):
            if problem := misfit(config, layout):
                report.say(f"{layout}: left out: {problem}")
                continue
            results[str(layout)] = measure(config, layout, run_dir / str(layout), source, narrow)
            for line in table(str(layout), results[str(layout)]):
                report.say(line)
        for folder in (source, narrow):
            shutil.rmtree(folder)
        content = {"host": describe_host(), "model": config.model.name, "dtype": config.model.dtype, "layouts": results}
        (run_dir / "bench.json").write_text(json.dumps(content, indent=2) + "\n")
        report.say(f"all figures: {run_dir / 'bench.json'}")


def misfit(config: Config, layout: Topology) -> str | None:
    """Returns why the model, or this host, can't have `layout`; None if it can."""
    if not platform.is_cpu() and layout.world_size > hardware.visible_gpus():
        return f"it needs {layout.world_size} GPUs, but this host has {hardware.visible_gpus()}"
    try:
        validation.check_layout(config, layout, known_sizes(config.model))
    except ConfigError as error:
        return str(error)
    return None


def write_configs(config: Config, run_dir: Path) -> tuple[Path, Path]:
    """Writes the configs of the measured model, and of a very narrow one with as many layers; returns their folders."""
    ignored = config.model.ignore_keys
    hf = config.model.hf or AutoBridge.from_hf_pretrained(config.model.path or "", ignore_keys=ignored).source.config
    bridge = AutoBridge.from_hf_config({key: value for key, value in hf.items() if key not in ignored})
    names = {"architectures": [bridge.source.family.architecture], "model_type": bridge.source.family.model_type}
    narrow = {**names, **bridge.source.family.tiny, "num_hidden_layers": bridge.source.native["num_layers"]}
    folders = []
    for name, content in (("source", bridge.source.config), ("narrow", narrow)):
        folder = run_dir / name
        folder.mkdir(parents=True)
        (folder / assets.CONFIG).write_text(json.dumps({**content, "dtype": config.model.dtype}, indent=2) + "\n")
        folders.append(folder)
    return folders[0], folders[1]


def measure(config: Config, layout: Topology, run_dir: Path, source: Path, narrow: Path) -> dict[str, Any]:
    """Runs recipes/bench_ranks.py under `layout`; returns the result that its rank 0 wrote."""
    values = asdict(config)
    values["run_dir"] = str(run_dir)
    values["parallel"] |= asdict(layout)
    values["recipe"] |= {
        "target": "recipes.bench_ranks:main",
        "single_process": False,
        "options": {"source": str(source), "narrow": str(narrow)},
    }
    local.launch(values, world_size=layout.world_size, platform=platform.DEVICE)
    result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return result


def table(layout: str, result: dict[str, Any]) -> list[str]:
    """Returns the results of a layout as lines for people."""
    seconds, size = result["seconds"], result["bytes"]
    lines = [f"{layout}: {result['tensors']} tensors, {size / 1e6:.1f} MB"]
    for name, taken in seconds.items():
        memory = result["anonymous_peak"].get(name)
        calls = result["collectives"].get(name)
        text = f"  {name:<26} {taken:8.3f} s"
        text += "" if name == "plan" else f" {size / taken / 1e9:8.2f} GB/s"
        text += "" if memory is None else f" {memory / 2**20:8.1f} MiB beside the model"
        text += "" if calls is None else f", collectives: {calls['objects']} of objects, {calls['tensors']} of tensors"
        lines.append(text)
    for name, peer, least in RATIOS:
        if peer in seconds:
            wanted = "" if least is None else f" (at least {least} wanted)"
            lines.append(f"  {name} is {seconds[peer] / seconds[name]:.2f} x {peer}{wanted}")
    read = result["bytes_read_per_rank"]
    lines.append("  bytes read per rank: " + ", ".join(f"{name} {count / 1e6:.1f} MB" for name, count in read.items()))
    cpu = result["cpu_microseconds_per_tensor"]
    lines.append("  CPU time per tensor: " + ", ".join(f"{name} {micro:.0f} us" for name, micro in cpu.items()))
    return lines


def describe_host() -> dict[str, Any]:
    """Returns the device, cores, torch version and load of the host that was measured."""
    device = "cpu" if platform.is_cpu() else torch.cuda.get_device_name()
    return {"device": device, "cores": hardware.cores(), "torch": torch.__version__, "load_at_end": os.getloadavg()[0]}
