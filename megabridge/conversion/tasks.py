"""What a conversion consists of, as data: a task per Hugging Face tensor, and the boxes that this rank holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from megabridge.conversion.parameters import LocalParameter, collect_parameters, unwrap
from megabridge.conversion.plan import Expansion, Plan, PlannedParameter, TensorSpec, WrittenBox
from megabridge.errors import ConfigError, MappingError, listed
from megabridge.families import Family
from megabridge.hf.tensor_files import native_box, view
from megabridge.mapping import Dims, Run, Transfer


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a Hugging Face tensor: its elements are those whose index along every dimension lies in a run."""

    transfer: Transfer

    @property
    def whole(self) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self.transfer.hf_shape

    @property
    def runs(self) -> tuple[Run, ...]:
        """By dimension, the indices: blocks of consecutive ones."""
        return tuple(axis.hf for axis in self.transfer.axes if axis.hf_dim is not None)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The box inside `tensor`, which has the whole shape and is contiguous, shaped as the local view that came with it."""
        return view(tensor, self.transfer.hf_view())


@dataclass(frozen=True, eq=False)
class ConversionTask:
    """One Hugging Face tensor and where it comes from.

    Names after `dtype` are Megatron Bridge's (WeightConversionTask). What says "here" is None on a rank that holds none of it.
    """

    hf_name: str
    shape: tuple[int, ...]
    """The whole tensor's."""
    dtype: torch.dtype
    """What it is exported in, unless the export asks for another."""
    global_param_names: tuple[str, ...]
    """Native parameters that hold it, with global layer numbers."""
    global_param_shapes: tuple[tuple[int, ...], ...]
    """Their shapes before any cut."""
    source_ranks: tuple[int, ...]
    """Ranks that give a part of it."""
    mapping: tuple[WrittenBox, ...]
    """The boxes that tile it, each with its rank and parameter."""
    param_name: str | None
    """The parameter's name in its chunk here."""
    param_weight: torch.Tensor | None
    """The live parameter here."""
    megatron_module: torch.nn.Module | None
    """The module that owns it."""
    vp_stage: int | None
    """The number of its chunk here."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def global_param_name(self) -> str:
        """The first of the native parameters."""
        return self.global_param_names[0]


def make_tasks(plan: Plan, model: Sequence[torch.nn.Module], specs: Mapping[str, TensorSpec]) -> list[ConversionTask]:
    """A task for each of `specs`, in their order. Nothing is exchanged."""
    shapes = {record.name: record.shape for records in plan.records for record in records}
    here: dict[str, LocalParameter] = {}
    for item in sorted(plan.items, key=lambda item: item.is_tied_copy):
        for name in item.hf:
            here.setdefault(name, item.live)
    return [_task(plan, model, name, spec, shapes, here) for name, spec in specs.items()]


def _task(plan: Plan, model: Sequence[torch.nn.Module], name: str, spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]],
          here: Mapping[str, LocalParameter]) -> ConversionTask:  # fmt: skip
    target = plan.aliases.get(name, name)
    sources = plan.sources[target]
    natives = tuple(dict.fromkeys(source.native for source in sources))
    live = here.get(target)
    return ConversionTask(
        hf_name=name,
        shape=spec.shape,
        dtype=spec.dtype,
        global_param_names=natives,
        global_param_shapes=tuple(shapes[native] for native in natives),
        source_ranks=tuple(sorted({source.rank for source in sources})),
        mapping=sources,
        param_name=None if live is None else live.local,
        param_weight=None if live is None else live.parameter,
        megatron_module=None if live is None else unwrap(model[live.chunk]).get_submodule(live.local.rpartition(".")[0]),
        vp_stage=None if live is None else live.chunk,
    )


def task_specs(
    plan: Plan, tasks: Sequence[ConversionTask], dtype: torch.dtype | Mapping[str, torch.dtype] | None
) -> dict[str, TensorSpec]:
    """What `tasks` ask for, in their order; `dtype`, one for all or by name, goes before theirs.

    Raises ConfigError for what is no tensor of `plan`, and for one that stands twice.
    """
    out: dict[str, TensorSpec] = {}
    problems = []
    for task in tasks:
        known = plan.tensors.get(plan.aliases.get(task.hf_name, task.hf_name))
        if known is None or known.shape != task.shape:
            problems.append(f"{task.hf_name} {task.shape} is not a tensor of this model")
        elif task.hf_name in out:
            problems.append(f"{task.hf_name} stands twice")
        wanted = dtype if isinstance(dtype, torch.dtype) else (dtype or {}).get(task.hf_name, task.dtype)
        out[task.hf_name] = TensorSpec(task.shape, wanted)
    if problems:
        raise ConfigError("conversion_tasks must be tasks of get_conversion_tasks(model), each once:\n  " + listed(problems))
    return out


def shards(
    family: Family, native: Mapping[str, object], model: Sequence[torch.nn.Module], *, replicas: bool
) -> Iterator[tuple[str, Box, torch.Tensor]]:
    """(tensor, box, local view) of what this rank gives, or with `replicas` of all it holds. Nothing is exchanged.

    The view shows the parameter's own memory. Raises MappingError for parameters that no rule feeds.
    """
    lives = collect_parameters(model)
    found, problems = Expansion(family, Dims.of(native)).entries(live.record for live in lives)
    if problems:
        raise MappingError("the model doesn't fit its architecture's rules:\n  " + listed(problems))
    by_name = {live.name: live for live in lives}
    return _shards([entry for entry in found if replicas or entry.is_writer], by_name)


def _shards(found: Sequence[PlannedParameter], lives: Mapping[str, LocalParameter]) -> Iterator[tuple[str, Box, torch.Tensor]]:
    for entry in found:
        for transfer in entry.transfers:
            yield entry.hf[transfer.part], Box(transfer), native_box(lives[entry.record.name].data, transfer)
