"""A covering choice of families: under each layout the few that together have every mechanism, and each family somewhere.

A mechanism is a setting of the Megatron model that a family's config brings, or a rule by which its weights are laid out. Each is met
under every layout of a test. `make test-grid` tries every family under every layout.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import cycle
from typing import Any, Final

import pytest

from megabridge.families import all_families
from tests.support.families import tiny_config


def further(*cases: Any) -> list[Any]:
    """Parameters of cases that `make test-grid` alone runs: others show the same claim in `make test`."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.grid) for case in cases]


GRID: Final = bool(os.environ.get("MEGABRIDGE_GRID"))
"""Whether everything is tried with everything."""


@cache
def mechanisms(name: str) -> frozenset[str]:
    """Those of a family, or of one of its variants."""
    family = all_families()[name.partition(":")[0]]
    native = family.native(tiny_config(name))
    settings = {f"{key}={value}" if isinstance(value, bool | str | None) else key for key, value in native.items()}
    return frozenset(settings | {type(rule.layout).__name__ for rule in family.weights.rules})


def cover(names: Sequence[str], layouts: Sequence[str]) -> Mapping[str, list[str]]:
    """The names to try under each layout."""
    if GRID:
        return {layout: list(names) for layout in layouts}
    used: Counter[str] = Counter()
    chosen: dict[str, list[str]] = {}
    for layout in layouts:
        chosen[layout] = _cover(names, used)
        used.update(chosen[layout])
    for name, layout in zip((name for name in names if not used[name]), cycle(reversed(layouts)), strict=False):
        chosen[layout].append(name)
    return {layout: sorted(taken) for layout, taken in chosen.items()}


def _cover(names: Sequence[str], used: Mapping[str, int]) -> list[str]:
    """Few names that together have every mechanism, rather those that were seldom used."""
    taken: list[str] = []
    missing = set[str]().union(*map(mechanisms, names))
    while missing:
        taken.append(max(names, key=lambda name: (len(mechanisms(name) & missing) / (1 + used.get(name, 0)), name)))
        missing -= mechanisms(taken[-1])
    for name in list(taken):
        if mechanisms(name) <= set[str]().union(*(mechanisms(other) for other in taken if other != name)):
            taken.remove(name)
    return taken
