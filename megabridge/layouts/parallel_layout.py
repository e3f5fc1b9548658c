"""ParallelLayout: a topology, and whether activations are cut along the sequence too. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megabridge.config.schema import Config
from megabridge.parallel.topology import Topology


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel dimensions, and whether sequence parallelism is on."""

    topology: Topology
    sequence_parallel: bool = False

    def __str__(self) -> str:
        return f"{self.topology}sp" if self.sequence_parallel else str(self.topology)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of `parallel` that make it; etp is None where it follows tp."""
        return {
            **self.topology.sizes(),
            "etp": self.topology.etp,
            "sequence_parallel": self.sequence_parallel,
            "auto": False,
        }

    @property
    def overrides(self) -> list[str]:
        """Overrides that choose it on the command line."""
        sizes = self.topology.sizes()
        given = {name: sizes[name] for name in ("tp", "pp", "vpp", "cp", "ep", "dp") if sizes[name] > 1}
        if self.topology.etp is not None:
            given["etp"] = self.topology.expert_tp
        texts = [f"parallel.{name}={size}" for name, size in given.items()] or ["parallel=single"]
        return [*texts, *["parallel.sequence_parallel=true"] * self.sequence_parallel]

    def config(self, config: Config) -> Config:
        """Returns `config` in this layout."""
        return replace(config, parallel=replace(config.parallel, **self.settings, layout=None))
