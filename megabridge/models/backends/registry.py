"""Registry of backends: looks one up by name, resolves `auto`, and lists why a backend can't build a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from megabridge.config import installed
from megabridge.config.validation import nearest
from megabridge.errors import ConfigError
from megabridge.models.backends.backend import Backend, Get
from megabridge.models.backends.local_backend import LocalBackend
from megabridge.models.backends.te_backend import TransformerEngineBackend
from megabridge.models.backends.torch_backend import TorchBackend

OURS: Final[Mapping[str, Backend]] = {one.name: one for one in (TorchBackend(), TransformerEngineBackend(), LocalBackend())}
_BEST_FIRST: Final = ("te", "torch")
"""The order in which `auto` tries backends. If none suits, the last is taken, and its problems are reported."""


def backend(name: str) -> Backend:
    """Returns the backend `name`, ours or an installed package's. Raises ConfigError, with the nearest name, when there is none."""
    if name in OURS:
        return OURS[name]
    points = installed.backends()
    if name not in points:
        known = ["auto", *OURS, *points]
        raise ConfigError(f"backend={name!r} must be one of {', '.join(known)}{nearest(str(name), known)}")
    found = points[name].load()
    if not isinstance(found, Backend) or found.name != name:
        raise ConfigError(
            f"entry point {name} = {points[name].value!r} must name a megabridge.models.backends.Backend whose name is {name!r}, "
            f"not {found!r}."
        )
    return found


def chosen(get: Get) -> Backend:
    """Returns the backend that a provider's settings select; auto: the first that suits. Raises ConfigError for an unknown name."""
    if get("backend") != "auto":
        return backend(get("backend"))
    able = (OURS[name] for name in _BEST_FIRST if _suits(OURS[name], get))
    return next(able, OURS[_BEST_FIRST[-1]])


def problems(one: Backend, get: Get) -> list[str]:
    """Reasons why a model with these settings can't be built from the backend's layers, a sentence each."""
    found = []
    if (missing := one.missing()) is not None:
        found.append(f"backend={one.name} {missing}; use backend={_BEST_FIRST[-1]}.")
    if get("adapted") and not one.has_adapters:
        found.append(f"adapters need backend={adapter_backends()}, not {one.name}; set it so.")
    for name, instead in one.lacks(get).items():
        others = " or ".join(other.name for other in OURS.values() if name not in other.lacks(get))
        rule = (
            f"needs backend={others}, not {one.name}; set it so"
            if others
            else f"is not supported by backend={one.name}; use another backend"
        )
        found.append(f"{name}={get(name)!r} {rule}{instead and f', or {instead}'}.")
    return found


def adapter_backends() -> str:
    """The names of the backends that support adapters, joined by "or"."""
    return " or ".join(name for name, one in OURS.items() if one.has_adapters)


def _suits(one: Backend, get: Get) -> bool:
    is_off_device = get("use_cpu_initialization") and not one.on_cpu  # a model that is converted in CPU memory
    return not is_off_device and not problems(one, get)
