"""The best layouts of a search with their memory traced: in one process, from chunks without memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Final

from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config.schema import Config
from megabridge.layouts import devices, search
from megabridge.layouts.search import Candidate, Found
from megabridge.layouts.work import Work
from megabridge.planning.memory import expected_memory
from megabridge.training import build

_TRIED: Final = 4
"""Times as many layouts as are wanted are traced at most once one is known to fit, should estimates let some through that don't."""


@dataclass(frozen=True)
class Ranked:
    """`layouts` has the fastest first, of which the first `traced` have a traced memory; a layout that was traced and is too large
    is not among them."""

    found: Found
    layouts: tuple[Candidate, ...]
    traced: int
    seconds: float
    """That it took."""


def ranked(config: Config, bridge: AutoBridge) -> Ranked:
    """Returns the layouts of what `config.plan` describes that fit, best first. In a process without groups.

    Raises ConfigError where nothing is legal or fits.
    """
    begin = time.perf_counter()
    machine = devices.machine(config.plan, platform=config.platform)
    fixed = search.fixed_sizes(config.parallel, config.plan.arguments)
    found = search.search(config, bridge.source.native, machine, fixed)
    found.best  # noqa: B018  # raises
    traced: list[Candidate] = []
    too_large: list[Candidate] = []
    wanted = config.plan.traced
    for tried, candidate in enumerate(found.fitting if wanted else ()):
        if len(traced) == wanted or (traced and tried >= _TRIED * wanted):
            break
        one = _traced(config, bridge, found.work, candidate)
        (traced if one.memory.total <= found.room else too_large).append(one)
    seen = len(traced) + len(too_large)
    rest = found.fitting[seen:]
    if not traced and not rest:
        found.fail(min(too_large, key=lambda each: each.memory.total), seen + found.too_large)
    return Ranked(found, (*traced, *rest), len(traced), time.perf_counter() - begin)


def _traced(config: Config, bridge: AutoBridge, work: Work, candidate: Candidate) -> Candidate:
    placed = candidate.layout.config(config)
    stages = work.dealt(candidate.layout.topology).heaviest
    exact = expected_memory(placed, bridge, build.provider(placed, bridge), stages)
    stage = max(range(len(stages)), key=lambda number: exact[number].total)
    return replace(candidate, memory=exact[stage], stage=stages[stage])
