"""Backends of other packages, in the entry-point group `megabridge.backends`. Their names are known without importing them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from megabridge.errors import ConfigError

GROUP: Final = "megabridge.backends"
OURS: Final = ("torch", "te", "local")
"""The backends that come with megabridge."""


@cache
def backends() -> dict[str, EntryPoint]:
    """Returns the backends of installed packages by name. Raises ConfigError for one with a name of ours."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    if taken := sorted(found.keys() & {"auto", *OURS}):
        points = ", ".join(f"{name} = {found[name].value!r}" for name in taken)
        raise ConfigError(f"an entry point of {GROUP} must have a name of its own, but there is {points}; rename it.")
    return found


def backend_names() -> tuple[str, ...]:
    """Returns the values that `backend=` accepts."""
    return ("auto", *OURS, *backends())
