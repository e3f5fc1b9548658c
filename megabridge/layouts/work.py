"""The work of a step under any layout: the model's shape, batches, precision, trained parameters. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from megabridge.config import layout_rules
from megabridge.config.pipeline_split import split_layers
from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.layouts.shape import Kind, Shape, is_known, shape_of
from megabridge.parallel.topology import Topology

FP32: Final = 4
"""Bytes of an element of gradients, masters and optimizer state."""
Part = Literal["dense", "mixture", "expert"]


@dataclass(frozen=True)
class Dealt:
    """Layers by stage. `kinds` counts them by kind; `chunks` has (dense ones, mixtures) of every chunk.

    `heaviest` are the stages among which the one of most memory is: the first of those with the same layers, which keeps most
    micro-batches, and the last, which has the output layer.
    """

    kinds: tuple[tuple[tuple[Kind, int], ...], ...]
    chunks: tuple[tuple[tuple[int, int], ...], ...]
    heaviest: tuple[int, ...]

    @classmethod
    def of(cls, shape: Shape, topology: Topology) -> Dealt:
        """Deals the layers as the provider does; those of multi-token prediction are in the last chunk."""
        counts, first = split_layers(shape.layers, pp=topology.pp, vpp=topology.vpp), 0
        counts[-1] += shape.mtp
        dealt: list[Counter[Kind]] = []
        for count in counts:
            dealt.append(Counter(shape.kinds[first : first + count]))
            first += count
        stages = [dealt[stage :: topology.pp] for stage in range(topology.pp)]
        kinds = tuple(tuple(sum(stage, Counter()).items()) for stage in stages)
        mixtures = [[sum(n for kind, n in chunk.items() if kind.is_mixture) for chunk in stage] for stage in stages]
        chunks = tuple(
            tuple((chunk.total() - mixed, mixed) for chunk, mixed in zip(stage, found, strict=True))
            for stage, found in zip(stages, mixtures, strict=True)
        )
        heaviest: dict[object, int] = {}
        for stage, own in enumerate(chunks):
            heaviest.setdefault(own, stage)
        return cls(kinds, chunks, tuple(sorted({0, *heaviest.values(), topology.pp - 1})))


@dataclass(frozen=True)
class Work:
    """`width` is the bytes of a parameter and of an activation. `rank` is that of adapters beside frozen weights, 0 without."""

    shape: Shape
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    width: int
    rank: int
    recomputes: bool
    """Whether a layer is computed again in the backward pass (recompute_granularity=full)."""
    moments: int
    """Moments that the optimizer keeps per trained parameter."""
    is_distributed: bool
    """Whether the optimizer's state is cut over the data-parallel ranks."""
    overlaps_reduce: bool
    overlaps_gather: bool
    _dealt: dict[tuple[int, int], Dealt] = field(default_factory=dict, repr=False, compare=False)
    _local: dict[tuple[Part, int], int] = field(default_factory=dict, repr=False, compare=False)

    def micro_batches(self, topology: Topology) -> int:
        """Returns the micro-batches of a data-parallel rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * topology.dp)

    def tokens(self, topology: Topology) -> int:
        """Returns the tokens of a micro-batch on a rank, where they are not cut along the sequence."""
        return self.micro_batch_size * self.seq_length // topology.cp

    def dealt(self, topology: Topology) -> Dealt:
        """Returns how the layers are dealt to the stages and chunks of a topology."""
        key = topology.pp, topology.vpp
        if key not in self._dealt:
            self._dealt[key] = Dealt.of(self.shape, topology)
        return self._dealt[key]

    def local(self, what: Part, tp: int) -> int:
        """Returns the elements on one of `tp` ranks of the matrices of a layer that every token passes through, or of an expert."""
        key = what, tp
        if key not in self._local:
            matrices = self.shape.expert if what == "expert" else self.shape.matrices[what == "mixture"]
            self._local[key] = sum(rows * columns for rows, columns in (matrix.local(tp) for matrix in matrices))
        return self._local[key]


def work_of(config: Config, sizes: Mapping[str, Any]) -> Work:
    """Returns the work of a run of `config`, whose model has these native settings.

    Raises ConfigError where the sizes aren't known, or the user says how layers are dealt to stages.
    """
    get = layout_rules.of_run(config, sizes)
    if not is_known(get):
        raise ConfigError(
            f"a layout can be chosen only for a model whose sizes are known before anything is fetched, but nothing says those of "
            f"model={config.model.name}; name a model of conf/model, or a local folder in model.path."
        )
    if layout_rules.follows_megatron(get):
        raise ConfigError(
            "a layout is chosen with layers dealt evenly; take parallel.layout, and what deals layers in model.provider, away."
        )
    recipe, optimizer = config.recipe, config.optimizer
    return Work(
        shape=shape_of(get),
        seq_length=recipe.seq_length,
        micro_batch_size=recipe.micro_batch_size,
        global_batch_size=recipe.global_batch_size,
        width=FP32 if str(get("params_dtype") or config.model.dtype) == "float32" else 2,
        rank=0 if config.peft.name == "none" else config.peft.r,
        recomputes=get("recompute_granularity") == "full",
        moments=2 if optimizer.name == "adam" else 1,
        is_distributed=optimizer.distributed,
        overlaps_reduce=optimizer.overlap_grad_reduce,
        overlaps_gather=optimizer.overlap_param_gather,
    )
