"""Topology: the sizes of tp, pp, vpp, cp, ep, etp and dp, and the coordinate of each rank. Pure integers.

The order is megatron-core's default `tp-cp-ep-dp-pp` (megatron/core/parallel_state.py): tp varies fastest, pp slowest.
Dense layers use tp x cp x dp x pp; expert layers use etp x ep x edp x pp over the same ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from megabridge.errors import ConfigError, listed

SETTINGS: Final[Mapping[str, str]] = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
"""Short name of each size of a layout, and megatron-core's setting. dp has none: it follows from the number of ranks."""
_NAMES: Final = (*SETTINGS, "dp")


@dataclass(frozen=True)
class Coordinate:
    """The indices of one rank in each parallel dimension. `edp` is the data-parallel index of the expert layers."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class Topology:
    """Sizes of the parallel dimensions. `vpp` is the number of model chunks per pipeline rank; `etp` None means tp.

    An `etp` equal to tp becomes None, so that equal layouts compare equal. Raises ConfigError for impossible sizes.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1

    def __post_init__(self) -> None:
        _check_sizes({name: getattr(self, name) for name in _NAMES})
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(f"parallel.vpp={self.vpp} needs pp > 1; set parallel.pp=2 or parallel.vpp=1.")
        if self.etp == self.tp:
            object.__setattr__(self, "etp", None)
        if self.stage_size % (self.expert_tp * self.ep):
            raise ConfigError(
                f"etp x ep = {self.expert_tp} x {self.ep} must divide tp x cp x dp = {self.stage_size}; "
                "change parallel.ep, parallel.etp or the number of ranks."
            )

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size of the expert layers."""
        return self.tp if self.etp is None else self.etp

    @property
    def stage_size(self) -> int:
        """Number of ranks in one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def world_size(self) -> int:
        return self.stage_size * self.pp

    @classmethod
    def for_world(cls, world_size: int, *, dp: int | None = None, **sizes: int | None) -> Topology:
        """Makes the topology of `world_size` ranks; `dp` follows from the other sizes unless it is given.

        Raises ConfigError when the product of the sizes is not `world_size`.
        """
        fixed = {name: size for name, size in sizes.items() if size is not None}
        _check_sizes(fixed)
        model = fixed.get("tp", 1) * fixed.get("pp", 1) * fixed.get("cp", 1)
        if dp is None:
            if world_size % model:
                raise ConfigError(
                    f"tp x pp x cp = {model} must divide the number of processes, {world_size}; "
                    f"start a multiple of {model} processes or change parallel.tp, parallel.pp, parallel.cp."
                )
            dp = world_size // model
        if model * dp != world_size:
            raise ConfigError(
                f"tp x pp x cp x dp = {model} x {dp} needs {model * dp} processes, but there are {world_size}; "
                "start that many or change the sizes in parallel."
            )
        return cls(dp=dp, **fixed)

    @classmethod
    def of_settings(cls, get: Callable[[str], Any], world_size: int | None = None) -> Topology:
        """Makes the topology of megatron-core's settings over `world_size` ranks, or for None over as few as possible.

        `get` reads a setting by its name in `SETTINGS`. Raises ConfigError for sizes that are impossible or don't fit `world_size`.
        """
        sizes = {short: get(name) for short, name in SETTINGS.items()}
        if sizes["vpp"] is None:
            sizes["vpp"] = 1
        if world_size is not None:
            return cls.for_world(world_size, **sizes)
        _check_sizes(sizes)
        experts = sizes["ep"] * (sizes["etp"] or sizes["tp"])
        return cls(**sizes, dp=experts // math.gcd(experts, sizes["tp"] * sizes["cp"]))

    def settings(self) -> dict[str, int | None]:
        """Returns the sizes by megatron-core's names, for `of_settings`; vpp is None if it is 1, and etp if it equals tp."""
        sizes = {name: getattr(self, short) for short, name in SETTINGS.items()}
        return {**sizes, SETTINGS["vpp"]: self.vpp if self.vpp > 1 else None}

    @classmethod
    def of_sizes(cls, sizes: Mapping[str, Any]) -> Topology:
        """Makes the topology with the sizes of `sizes()`, as files store them. Raises ConfigError for anything else."""
        if not isinstance(sizes, Mapping) or not set(sizes) <= set(_NAMES):
            raise ConfigError(f"a layout must be sizes of {', '.join(_NAMES)}, not {str(sizes)[:200]}.")
        return cls(**sizes)

    def sizes(self) -> dict[str, int]:
        """Returns all sizes by their short names; etp is a number too."""
        return {**{name: getattr(self, name) for name in _NAMES}, "etp": self.expert_tp}

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Parses the form that `str` writes: `single`, `tp2pp2vpp2`. Raises ConfigError for anything else."""
        sizes = re.findall(r"(tp|pp|vpp|cp|ep|dp|etp)([0-9]+)", text)
        if text != "single" and (not sizes or "".join(map("".join, sizes)) != text or len(dict(sizes)) != len(sizes)):
            raise ConfigError(f"the layout {text!r} must read like single, tp2 or tp2pp2vpp2.")
        return cls(**{name: int(size) for name, size in sizes})

    def coordinate(self, rank: int) -> Coordinate:
        """Returns the coordinate of global rank `rank`, 0 <= rank < world_size. Raises ConfigError for other ranks."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} is outside 0..{self.world_size - 1}.")
        pp, inside = divmod(rank, self.stage_size)
        dp, rest = divmod(inside, self.tp * self.cp)
        cp, tp = divmod(rest, self.tp)
        edp, rest = divmod(inside, self.expert_tp * self.ep)
        ep, etp = divmod(rest, self.expert_tp)
        return Coordinate(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep, edp=edp)

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """Returns the global rank at a dense coordinate."""
        return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp

    @property
    def model(self) -> str:
        """As `str`, without dp: the layout of one model replica."""
        return self._text(*(name for name in _NAMES if name != "dp"))

    def __str__(self) -> str:
        return self._text(*_NAMES)

    def _text(self, *names: str) -> str:
        sizes = self.sizes()
        text = "".join(f"{name}{sizes[name]}" for name in names if name != "etp" and sizes[name] > 1)
        return (text if self.etp is None else f"{text}etp{self.etp}") or "single"


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raises ConfigError for all sizes that are not whole numbers of at least 1."""
    problems = [
        f"parallel.{name}={size!r} must be at least 1, and whole; set it so."
        for name, size in sizes.items()
        if not (type(size) is int and size >= 1) and not (name == "etp" and size is None)
    ]
    if problems:
        raise ConfigError(listed(problems))
