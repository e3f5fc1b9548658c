"""A conversion as data: a task per Hugging Face tensor, and the boxes that this rank holds."""

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
        """The indices along each dimension, as blocks of consecutive ones."""
        return tuple(axis.hf for axis in self.transfer.axes if axis.hf_dim is not None)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the box inside `tensor`, a contiguous tensor of the whole shape, in the shape of the box's local view."""
        return view(tensor, self.transfer.hf_view())


@dataclass(frozen=True, eq=False)
class ConversionTask:
    """One Hugging Face tensor and the parameters that hold it.

    Names after `dtype` are Megatron Bridge's (WeightConversionTask). Fields that describe this rank's parameter are None on a rank
    that holds no part of the tensor.
    """

    hf_name: str
    shape: tuple[int, ...]
    """The whole tensor's shape."""
    dtype: torch.dtype
    """The dtype it is exported in, unless the export asks for another."""
    global_param_names: tuple[str, ...]
    """Names of the native parameters that hold it, with global layer numbers."""
    global_param_shapes: tuple[tuple[int, ...], ...]
    """Their shapes before any cut."""
    source_ranks: tuple[int, ...]
    """Ranks that write a part of it."""
    mapping: tuple[WrittenBox, ...]
    """The boxes that tile it, each with its rank and parameter."""
    param_name: str | None
    """Name of this rank's parameter in its chunk."""
    param_weight: torch.Tensor | None
    """This rank's parameter."""
    megatron_module: torch.nn.Module | None
    """The module that owns the parameter."""
    vp_stage: int | None
    """The number of the parameter's chunk."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def global_param_name(self) -> str:
        """Name of the first of the native parameters."""
        return self.global_param_names[0]


def make_tasks(plan: Plan, model: Sequence[torch.nn.Module], specs: Mapping[str, TensorSpec]) -> list[ConversionTask]:
    """Returns a task for each of `specs`, in their order. Not collective."""
    shapes = {record.name: record.shape for records in plan.records for record in records}
    here: dict[str, LocalParameter] = {}
    for item in sorted(plan.items, key=lambda item: item.is_tied_copy):
        for name in item.hf:
            here.setdefault(name, item.local)
    return [_task(plan, model, name, spec, shapes, here) for name, spec in specs.items()]


def _task(plan: Plan, model: Sequence[torch.nn.Module], name: str, spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]],
          here: Mapping[str, LocalParameter]) -> ConversionTask:  # fmt: skip
    target = plan.aliases.get(name, name)
    sources = plan.sources[target]
    natives = tuple(dict.fromkeys(source.native for source in sources))
    own = here.get(target)
    return ConversionTask(
        hf_name=name,
        shape=spec.shape,
        dtype=spec.dtype,
        global_param_names=natives,
        global_param_shapes=tuple(shapes[native] for native in natives),
        source_ranks=tuple(sorted({source.rank for source in sources})),
        mapping=sources,
        param_name=None if own is None else own.local,
        param_weight=None if own is None else own.parameter,
        megatron_module=None if own is None else unwrap(model[own.chunk]).get_submodule(own.local.rpartition(".")[0]),
        vp_stage=None if own is None else own.chunk,
    )


def task_specs(
    plan: Plan, tasks: Sequence[ConversionTask], dtype: torch.dtype | Mapping[str, torch.dtype] | None
) -> dict[str, TensorSpec]:
    """Returns the tensors of `tasks`, in their order; `dtype`, one for all or one by name, overrides theirs.

    Raises ConfigError for a task that is no tensor of `plan`, and for one given twice.
    """
    out: dict[str, TensorSpec] = {}
    problems = []
    for task in tasks:
        known = plan.tensors.get(plan.aliases.get(task.hf_name, task.hf_name))
        if known is None or known.shape != task.shape:
            problems.append(f"{task.hf_name} {task.shape} is not a tensor of this model")
        elif task.hf_name in out:
            problems.append(f"{task.hf_name} is given twice")
        wanted = dtype if isinstance(dtype, torch.dtype) else (dtype or {}).get(task.hf_name, task.dtype)
        out[task.hf_name] = TensorSpec(task.shape, wanted)
    if problems:
        raise ConfigError("conversion_tasks must be tasks of get_conversion_tasks(model), each once:\n  " + listed(problems))
    return out


def shards(
    family: Family, native: Mapping[str, object], model: Sequence[torch.nn.Module], *, replicas: bool
) -> Iterator[tuple[str, Box, torch.Tensor]]:
    """Yields (tensor, box, local view) of the boxes that this rank writes or, with `replicas`, of all it holds. Not collective.

    The view shares the parameter's memory. Raises MappingError for parameters that no rule feeds.
    """
    parameters = collect_parameters(model)
    found, problems = Expansion(family, Dims.of(native)).entries(parameter.record for parameter in parameters)
    if problems:
        raise MappingError("the model doesn't fit its architecture's rules:\n  " + listed(problems))
    by_name = {parameter.name: parameter for parameter in parameters}
    return _shards([entry for entry in found if replicas or entry.is_writer], by_name)


def _shards(found: Sequence[PlannedParameter], parameters: Mapping[str, LocalParameter]) -> Iterator[tuple[str, Box, torch.Tensor]]:
    for entry in found:
        for transfer in entry.transfers:
            yield entry.hf[transfer.part], Box(transfer), native_box(parameters[entry.record.name].data, transfer)
