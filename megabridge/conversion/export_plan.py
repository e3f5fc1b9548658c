"""The plan of an export: tensors, dtypes, encoding, files, and which rank writes what, decided before a byte is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import torch

from megabridge.conversion.earlier_export import check_apart
from megabridge.conversion.encoding import Encoder, agree_on_encoder, scale_owners
from megabridge.conversion.plan import Plan, TensorSpec
from megabridge.conversion.shards import Shard, plan_shards
from megabridge.errors import ConfigError
from megabridge.families.core.quantization import Quantization
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.mapping import natural
from megabridge.parallel import collectives
from megabridge.storage import folders

Dtypes = Mapping[str, torch.dtype] | torch.dtype | None
WRITERS: Final = ("shared", "gather")


@dataclass(frozen=True)
class ExportPlan:
    """Everything that an export to `path` writes: the boxes of `plan`, encoded by `encoder`, into the files `shards`.

    With `is_shared`, every rank writes what it owns to a shared file system; otherwise rank 0 receives and writes everything.
    """

    plan: Plan
    path: Path
    encoder: Encoder
    shards: list[Shard]
    is_shared: bool

    @property
    def partial(self) -> Path:
        """The hidden folder beside `path` in which the files are made."""
        return folders.partial_of(self.path)

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor of the files by name, in the order of the files."""
        return {name: info for shard in self.shards for name, info in shard.tensors.items()}

    @cached_property
    def writers(self) -> dict[str, list[int]]:
        """The ranks that write each tensor."""
        if not self.is_shared:
            return {name: [0] for name in self.infos}
        owners, boxes, aliases = scale_owners(self.plan, self.encoder.dtypes), self.plan.sources, self.plan.aliases
        return {
            name: [owners[name]] if name in owners else sorted({box.rank for box in boxes[aliases.get(name, name)]})
            for name in self.infos
        }


def plan_export(
    plan: Plan,
    path: Path,
    *,
    dtypes: Dtypes = None,
    aliases: frozenset[str] = frozenset(),
    max_shard_size: str | int | None = None,
    files: Mapping[str, Sequence[str]] | None = None,
    only: str | None = None,
    writer: str = "shared",
    quantization: Quantization | None = None,
    sources: Iterable[Path] = (),
) -> ExportPlan:
    """Returns the plan for exporting the boxes of `plan`. Collective.

    With `writer="shared"` every rank writes what it owns, and all must see the same file system; with "gather" rank 0 receives and
    writes everything to its own. The tensors are in one file called `only`, or distributed as `files` says, or by
    `max_shard_size`. `quantization` quantises linears to FP8. Raises ConfigError for a wrong argument, CheckpointError where the
    export would replace one of the folders `sources`, which the model was read from.
    """
    if writer not in WRITERS:
        raise ConfigError(f"writer={writer!r} must be one of {', '.join(WRITERS)}.")
    path = Path(os.path.realpath(path))
    collectives.on_rank_zero("looking where the export goes", lambda: check_apart(path, sources))
    specs = export_specs(plan, dtypes, aliases)
    encoder = agree_on_encoder(plan, specs, quantization, everything=writer == "gather")
    shards = plan_shards(folders.partial_of(path), encoder.specs(specs), max_shard_size, only=only, files=files)
    return ExportPlan(plan, path, encoder, shards, writer == "shared")


def export_specs(plan: Plan, dtypes: Dtypes, aliases: frozenset[str]) -> dict[str, TensorSpec]:
    """Returns the tensors to write, `aliases` included, in natural order: in one dtype, in one by name, or in the parameters'."""
    specs = dict(plan.tensors) | {alias: plan.tensors[plan.aliases[alias]] for alias in aliases}
    if isinstance(dtypes, torch.dtype):
        specs = {name: replace(spec, dtype=dtypes) for name, spec in specs.items()}
    elif dtypes is not None:
        specs = {name: replace(spec, dtype=dtypes.get(name, spec.dtype)) for name, spec in specs.items()}
    return {name: specs[name] for name in sorted(specs, key=natural)}
