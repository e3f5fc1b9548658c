"""Configs and searches of layouts, without torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from megabridge.config.schema import Config, typed
from megabridge.families.core.known_sizes import known_sizes
from megabridge.layouts import devices, memory, search, step_time
from megabridge.layouts.devices import Device, Machine
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.layouts.work import work_of
from megabridge.parallel.topology import Topology
from tests.support.command import ROOT

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def config(model: str, *, hf: dict[str, Any] | None = None, provider: dict[str, Any] | None = None, **groups: Any) -> Config:
    """A training run of a model of conf/model; `groups` are settings by group, as recipe={"seq_length": 512}."""
    content: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / f"{model}.yaml"))
    content["hf"] |= hf or {}
    content["provider"] = provider or {}
    return typed({"model": content, "run_dir": "run", **groups})


def found(config: Config, machine: Machine, **fixed: Any) -> search.Found:
    return search.search(config, known_sizes(config.model), machine, fixed)


def machine(count: int, name: str = "h100", **figures: Any) -> Machine:
    return Machine(count, replace(devices.device(name), **figures))


def model(config: Config, count: int = 1, device: Device | None = None) -> step_time.Model:
    return step_time.Model(work_of(config, known_sizes(config.model)), Machine(count, device or devices.device("h100")))


def seconds(config: Config, layout: ParallelLayout, device: Device | None = None) -> step_time.StepTime:
    return model(config, layout.topology.world_size, device).step(layout)


def speed(config: Config, topology: Topology | None = None) -> float:
    """Tokens per second that are expected on H100s."""
    layout = ParallelLayout(topology or Topology())
    return config.recipe.global_batch_size * config.recipe.seq_length / seconds(config, layout).total


def gib(config: Config, layout: ParallelLayout) -> float:
    """Of the stage that is expected to need most."""
    needs = memory.expected(work_of(config, known_sizes(config.model)), layout)
    return max(one.total for one in needs.values()) / 2**30
