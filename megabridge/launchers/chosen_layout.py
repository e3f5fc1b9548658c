"""parallel=auto: chooses the layout of a run in the parent, before anything is checked or started. No torch.

The sizes that were chosen take the place of `auto` in the config, so that config.yaml, every rank and a resumed run have them. A
run that is resumed keeps the layout that it had, where that is still possible and nobody asks for another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from megabridge.config import readers, redaction
from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.families.core.known_sizes import known_sizes
from megabridge.layouts import devices
from megabridge.layouts.devices import Machine
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.layouts.search import GIB, Found, fixed_sizes, problems_of, search
from megabridge.layouts.work import work_of
from megabridge.parallel.topology import SETTINGS, Topology
from megabridge.storage import steps

_OWN: Final = re.compile(r"\+*(recipe=|plan\.|plan=|parallel=|run_dir=|hydra[./])")
"""Overrides of a plan that the run which it plans for doesn't have. Those of single sizes say which are given."""
_ABOVE: Final = 3
"""A run's directory is so many folders above a native checkpoint at most: RUN/checkpoints/step_N/native."""


def is_open(config: Config) -> bool:
    """Whether the layout of `parallel` is still to be found: by `settle`, or by recipe=plan itself."""
    return config.parallel.auto or (config.recipe.single_process and config.plan.gpus is not None and readers.plans_layouts(config))


def here(config: Config, started: int | None = None) -> Machine:
    """Returns the devices that `plan` names, else those of this host; `started` counts processes of torchrun or srun."""
    return devices.machine(config.plan, platform=config.platform, started=started)


def settle(
    cfg: DictConfig, values: dict[str, Any], config: Config, overrides: Sequence[str], machine: Callable[[], Machine]
) -> Config:
    """Returns `config` with its layout chosen where it is `is_open`; `cfg` and `values` are changed accordingly.

    For recipe=plan only what it needs of the command is added. Raises ConfigError where no layout is legal or none fits.
    """
    if not is_open(config):
        return config
    if not readers.may_choose(config):
        raise ConfigError(
            "parallel=auto chooses a layout for recipe=finetune, recipe=pretrain and recipe=plan, by the time of a step; name "
            f"one for recipe.target={config.recipe.target}, as parallel=tp2."
        )
    if config.recipe.single_process:
        _check(config, overrides, machine())
        arguments = [text for text in overrides if not _OWN.match(text)]
        values["plan"]["arguments"] = arguments
        return replace(config, plan=replace(config.plan, arguments=arguments))
    layout, said = _choose(config, overrides, machine)
    print(f"megabridge: {said}", flush=True)
    values["parallel"] |= layout.settings
    with read_write(cfg), open_dict(cfg):
        cfg.parallel = OmegaConf.merge(cfg.parallel, layout.settings)
    return layout.config(config)


def _check(config: Config, overrides: Sequence[str], found_here: Machine) -> None:
    """Raises ConfigError where no layout is legal or none fits, as far as the model's sizes are known here."""
    if sizes := known_sizes(config.model):
        search(config, sizes, found_here, fixed_sizes(config.parallel, overrides), is_enough=True).best  # noqa: B018


def _choose(config: Config, overrides: Sequence[str], machine: Callable[[], Machine]) -> tuple[ParallelLayout, str]:
    """Returns the layout, and the line that says which and why."""
    sizes, found_here = known_sizes(config.model), machine()
    work_of(config, sizes)  # its refusals come first
    fixed = fixed_sizes(config.parallel, overrides)
    before, why_not = _before(config, sizes, found_here, fixed)
    if before is not None:
        return before, f"parallel=auto: {before}, the layout that the resumed run had"
    found = _searched(config, sizes, found_here, fixed)
    best = found.best
    said = (
        f"parallel=auto: {best.layout} on {found.machine.count} x {found.machine.device.name}: expected {best.time.total:.3g} s a "
        f"step and {best.gib:.1f} of {found.room / GIB:.1f} GiB, the fastest of {len(found.fitting)} layouts that fit"
    )
    if len(found.fitting) > 1:
        second = found.fitting[1]
        said += f" (next: {second.layout}, {second.time.total:.3g} s)"
    return best.layout, said + why_not


def _searched(config: Config, sizes: Mapping[str, Any], machine: Machine, fixed: Mapping[str, Any]) -> Found:
    """Searches this machine; with fewer of a CPU's cores where so many allow no layout, unless their number was given."""
    try:
        return search(config, sizes, machine, fixed)
    except ConfigError as error:
        is_given = config.plan.gpus is not None or machine.device.name != devices.CPU or config.plan.device is not None
        for count in () if is_given else range(machine.count - 1, 0, -1):
            fewer = devices.machine(replace(config.plan, gpus=count), platform=devices.CPU)
            try:
                return search(config, sizes, fewer, fixed)
            except ConfigError:
                continue
        raise error


def _before(
    config: Config, sizes: Mapping[str, Any], machine: Machine, fixed: Mapping[str, Any]
) -> tuple[ParallelLayout | None, str]:
    """Returns the layout of the run to be resumed, or None, and the reason where it can't be kept."""
    if fixed:
        return None, ""
    for folder in _directories(config):
        parallel = redaction.written(folder).get("parallel")
        layout = _layout(parallel, machine.count) if isinstance(parallel, Mapping) else None
        if layout is not None:
            problems = problems_of(config, sizes, layout)
            return (layout, "") if not problems else (None, f"; the resumed run's {layout} is no longer allowed: {problems[0]}")
    return None, ""


def _directories(config: Config) -> Iterator[Path]:
    """Yields the folders where the config.yaml of the run to be resumed may be."""
    resume = config.checkpoint.resume
    if resume == "auto":
        places = steps.places(Path(config.run_dir), config.checkpoint.path, config.checkpoint.spare_path)
        if steps.saved_in(places):
            yield from (Path(config.run_dir), places[0].parent)
    elif resume != "none":
        yield from list(Path(resume).absolute().parents)[:_ABOVE]


def _layout(parallel: Mapping[str, Any], count: int) -> ParallelLayout | None:
    """Returns the layout of a written config over `count` processes; None where they can't have it."""
    sizes = {name: parallel.get(name) for name in SETTINGS}
    if not all(type(size) is int or (name == "etp" and size is None) for name, size in sizes.items()):
        return None
    try:
        return ParallelLayout(Topology.for_world(count, **sizes), parallel.get("sequence_parallel") is True)
    except ConfigError:
        return None
