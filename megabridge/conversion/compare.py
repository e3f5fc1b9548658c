"""Compares a model's parameters with the tensors of a folder, bit for bit and box by box, without gathering them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from megabridge.conversion.plan import Plan
from megabridge.conversion.read_loop import ReadTask, ReadWorker, bytes_of
from megabridge.conversion.shared_reads import SharedReads, read_boxes, shared_reads
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import PIECE, Fetched, Reader, Way, native_box
from megabridge.mapping import Transfer
from megabridge.parallel import collectives

_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE: Final = PIECE // 4  # bytes compared at once on a CPU, so that they fit its cache


Convert = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
Cast = Callable[[ReadTask, Transfer, Pair, Convert], Pair]


@dataclass(frozen=True)
class Difference:
    """The result of a comparison over all ranks: tensors that differ, the largest difference of a value, bytes compared."""

    mismatched: tuple[str, ...]
    max_abs: float
    bytes_compared: int


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors of one dtype, shape and device have equal bits (NaNs and signed zeros included)."""
    return torch.equal(*_integers(ours, theirs))


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all elements are finite, as a scalar tensor on the same device.

    Looks only at the extremes, which are NaN where any element is: many times faster than looking at each element.
    """
    if tensor.numel() == 0:
        return torch.tensor(True, device=tensor.device)
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # torch has no aminmax of float8; bfloat16 holds every value of it
    least, most = tensor.aminmax()
    return least.isfinite() & most.isfinite()


def _integers(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both viewed as the widest integers that their strides allow, so that fewer elements are compared."""
    ours, theirs = ours.squeeze(), theirs.squeeze()
    itemsize = ours.element_size()
    width = next((w for w in (8, 4, 2) if w > itemsize and _fits(ours, w) and _fits(theirs, w)), itemsize)
    kind = _INTEGERS[width]
    return ours.view(kind), theirs.view(kind)


def _fits(tensor: torch.Tensor, width: int) -> bool:
    if tensor.dim() == 0 or tensor.stride(-1) != 1 or tensor.data_ptr() % width:
        return False
    counts = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return all(count * tensor.element_size() % width == 0 for count in counts)


def compare(
    plan: Plan,
    infos: Mapping[str, TensorInfo],
    cast: Cast,
    *,
    absent: frozenset[str] = frozenset(),
    more: Sequence[ReadTask] = (),
    way: Way = "auto",
    dedupe: bool = False,
) -> Difference:
    """Compares every copy of every parameter with the boxes of its tensors. Collective: every rank gets the same answer.

    `cast(task, part, (ours, theirs), convert)` brings a pair of boxes to one dtype: after an import, the file's box is cast to the
    parameter's dtype; after an export, ours is encoded as the file should hold it. Tensors in `absent` are left out, tasks in
    `more` are added; aliases that the folder has are compared too. `way` and `dedupe` say how the files are read (see
    `import_weights`).
    """
    tasks = [*_read_tasks(plan, infos, absent), *more]
    distances: dict[str, float] = {}
    with (
        shared_reads(infos, tasks, dedupe=dedupe) as shared,
        collectives.raise_together("comparing weights"),
        Reader(infos.values(), way=way) as reader,
    ):
        differing = _differing(reader, tasks, cast, shared)
        for task in differing:
            distances[task.info.name] = max(distances.get(task.info.name, 0.0), _distance(reader, task, cast))
        reader.finish()
    found = collectives.all_gather((distances, bytes_of(tasks)))
    merged = sorted({name for names, _ in found for name in names})
    return Difference(tuple(merged), max((d for names, _ in found for d in names.values()), default=0.0), sum(n for _, n in found))


def _read_tasks(plan: Plan, infos: Mapping[str, TensorInfo], absent: frozenset[str]) -> list[ReadTask]:
    out = []
    for item in plan.items:
        target = item.local.data
        for transfer in item.transfers:
            names = plan.copies_of(item.hf[transfer.part], infos)
            out += [ReadTask(infos[name], transfer, target) for name in names if name not in absent]
    return out


def _differing(reader: Reader, tasks: list[ReadTask], cast: Cast, shared: SharedReads | None) -> list[ReadTask]:
    """Returns the tasks whose boxes differ. The parameters' device compares them and is waited for once, at the end."""
    verdicts: list[tuple[ReadTask, torch.Tensor | bool]] = []

    def visit(worker: ReadWorker, task: ReadTask, part: Transfer, fetched: Fetched) -> None:
        ours, theirs = _integers(*cast(task, part, (native_box(task.target, part), worker.on_device(fetched)), worker.converted))
        equal = torch.equal(ours, theirs) if ours.device.type == "cpu" else (ours == theirs).all()
        verdicts.append((task, equal))

    on_cpu = all(task.target.device.type == "cpu" for task in tasks)
    read_boxes(reader, tasks, visit, shared=shared, limit=_AT_ONCE if on_cpu else PIECE)
    tensors = [equal for _, equal in verdicts if isinstance(equal, torch.Tensor)]
    answers = iter(torch.stack(tensors).tolist() if tensors else [])  # one wait for the device
    return list(dict.fromkeys(task for task, equal in verdicts if not (equal if isinstance(equal, bool) else next(answers))))


def _distance(reader: Reader, task: ReadTask, cast: Cast) -> float:
    """Returns the largest difference of a value: infinite where one is NaN, 0 where only signs of zeros differ."""
    largest = 0.0
    worker = ReadWorker(task.target.device)
    for part in reader.parts(task.info, task.transfer, _AT_ONCE):
        with worker.stream():
            fetched = reader.fetch(task.info, part, worker.buffer)
            ours, theirs = cast(task, part, (native_box(task.target, part), worker.on_device(fetched)), worker.converted)
            distance = (ours.double() - theirs.double()).abs().max().item()
        largest = max(largest, float("inf") if distance != distance else distance)
    return largest


def to_native(task: ReadTask, part: Transfer, pair: Pair, convert: Convert) -> Pair:
    """Casts the file's box to the parameter's dtype."""
    ours, theirs = pair
    return ours, convert(theirs, ours.dtype)
