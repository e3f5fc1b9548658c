"""Topology: how many ranks each kind of parallelism has, and which rank sits where. Pure integers.

The order is megatron-core's default `tp-cp-ep-dp-pp` (megatron/core/parallel_state.py): tp varies fastest, pp slowest.
Dense layers see tp x cp x dp x pp; expert layers see etp x ep x edp x pp over the same ranks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megabridge.errors import ConfigError


@dataclass(frozen=True)
class Coordinate:
    """Where one rank sits. `edp` is the data-parallel index of the expert layers."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class Topology:
    """Sizes of the parallel dimensions. `vpp` is the number of model chunks per pipeline rank; `etp` None means tp."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "ep", "dp", "etp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"parallel.{name}={value} must be at least 1.")
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(f"parallel.vpp={self.vpp} needs pp > 1; set parallel.pp=2 or parallel.vpp=1.")
        if self.stage_size % (self.expert_tp * self.ep):
            raise ConfigError(
                f"etp x ep = {self.expert_tp} x {self.ep} must divide tp x cp x dp = {self.stage_size}; "
                "change parallel.ep, parallel.etp or the number of ranks."
            )

    @property
    def expert_tp(self) -> int:
        """Tensor parallel size of the expert layers."""
        return self.tp if self.etp is None else self.etp

    @property
    def stage_size(self) -> int:
        """Ranks in one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def world_size(self) -> int:
        return self.stage_size * self.pp

    @classmethod
    def for_world(cls, world_size: int, *, dp: int | None = None, **sizes: int | None) -> Topology:
        """The topology of `world_size` ranks; `dp` follows from the other sizes unless it is given.

        Raises ConfigError when the sizes don't multiply to `world_size`.
        """
        fixed = {name: size for name, size in sizes.items() if size is not None}
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
    def parse(cls, text: str) -> Topology:
        """The topology that `str` writes so: `single`, `tp2pp2vpp2`. Raises ConfigError for anything else."""
        sizes = re.findall(r"(tp|pp|vpp|cp|ep|dp|etp)([0-9]+)", text)
        if text != "single" and (not sizes or "".join(map("".join, sizes)) != text or len(dict(sizes)) != len(sizes)):
            raise ConfigError(f"the layout {text!r} must read like single, tp2 or tp2pp2vpp2.")
        return cls(**{name: int(size) for name, size in sizes})

    def coordinate(self, rank: int) -> Coordinate:
        """The place of global rank `rank`, 0 <= rank < world_size."""
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} is outside 0..{self.world_size - 1}.")
        pp, inside = divmod(rank, self.stage_size)
        dp, rest = divmod(inside, self.tp * self.cp)
        cp, tp = divmod(rest, self.tp)
        edp, rest = divmod(inside, self.expert_tp * self.ep)
        ep, etp = divmod(rest, self.expert_tp)
        return Coordinate(tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep, edp=edp)

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The global rank at a dense coordinate."""
        return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp

    def __str__(self) -> str:
        sizes = (("tp", self.tp), ("pp", self.pp), ("vpp", self.vpp), ("cp", self.cp), ("ep", self.ep), ("dp", self.dp))
        text = "".join(f"{name}{size}" for name, size in sizes if size > 1)
        if self.etp is not None and self.etp != self.tp:
            text += f"etp{self.etp}"
        return text or "single"
