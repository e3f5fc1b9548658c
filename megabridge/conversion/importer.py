"""Imports weights: each rank copies exactly its own boxes out of the files. Nothing is sent between ranks or held whole."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path

import torch

from megabridge.conversion.compare import compare, is_finite, to_native
from megabridge.conversion.plan import Plan, check_source
from megabridge.conversion.read_loop import Progress, ReadTask, device_of, fill, silent
from megabridge.conversion.report import Report
from megabridge.conversion.shared_reads import node_of_this_rank, read_boxes, shared_reads
from megabridge.errors import CheckpointError, ParityError, listed
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import PAGE, PIECE, Reader, Way, native_box
from megabridge.parallel import collectives

__all__ = ["Progress", "import_weights", "silent"]
Spans = dict[str, list[tuple[int, int]]]  # by file, the first page and one past the last


@torch.no_grad()
def import_weights(
    plan: Plan,
    infos: Mapping[str, TensorInfo],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    allow_nonfinite: bool = False,
    verify: bool = True,
    way: Way = "auto",
    dedupe: bool = False,
    progress: Progress = silent,
) -> Report:
    """Fills this rank's parameters from a folder's tensors (see `find_tensors`), cast to the parameters' dtype. Collective.

    Elements that no tensor feeds (vocabulary padding) become zero. `way` is how a Reader reads short contiguous runs; with `dedupe`
    the ranks of a node read every block once between them. Raises MappingError before anything is copied when names or shapes
    differ, CheckpointError for damaged files and (unless `allow_nonfinite`) for NaN or infinite weights, ParityError when a copy
    differs (`verify`); the same error on every rank.
    """
    begin = time.perf_counter()
    with collectives.raise_together("checking the source"):
        absent = check_source(plan, infos, allow_missing=allow_missing, allow_unexpected=allow_unexpected)
        _check_dtypes([infos[name] for name in (*plan.tensors, *plan.aliases) if name in infos])
    tasks = _read_tasks(plan, infos, absent)
    with (
        shared_reads(infos, tasks, dedupe=dedupe) as shared,
        collectives.raise_together("reading weights"),
        Reader(infos.values(), way=way) as reader,
    ):
        _zero_unfed(plan, absent)
        limit = PIECE if device_of(tasks).type == "cuda" else PIECE // 2
        read_boxes(reader, tasks, fill, shared=shared, straight=True, limit=limit, progress=progress)
        reader.finish()
        _synchronize(tasks)
    counts = collectives.all_gather((reader.bytes_copied, node_of_this_rank(), _merged(reader.fetched)))
    seconds = time.perf_counter() - begin
    names = [name for name in plan.tensors if name not in absent]
    copied = tuple(count for count, _, _ in counts)
    report = Report(
        tensors=len(names),
        bytes=sum(infos[name].nbytes for name in names),
        bytes_copied=sum(copied),
        seconds=seconds,
        verify_seconds=0.0,
        mismatched=(),
        max_abs_diff=0.0,
        is_verified=False,
        copied_by_rank=copied,
        fetched_by_node=_by_node([(node, spans) for _, node, spans in counts]),
    )
    begin = time.perf_counter()
    if verify:
        found = compare(plan, infos, to_native, absent=absent, way=way, dedupe=dedupe)
        _refuse(plan, found.mismatched)
        report = replace(report, mismatched=found.mismatched, max_abs_diff=found.max_abs, is_verified=True)
    if not allow_nonfinite:
        refuse_nonfinite(plan, absent)
    return replace(report, verify_seconds=time.perf_counter() - begin)


def _check_dtypes(infos: Sequence[TensorInfo]) -> None:
    """Raises CheckpointError for weights that aren't floating-point numbers, and for two dtypes of one size.

    A single wrong letter in a header turns BF16 into F16; no checkpoint mixes two dtypes of one size.
    """
    problems = [f"{info.name} is {info.dtype}" for info in infos if not info.dtype.is_floating_point]
    counts = Counter(info.dtype for info in infos if info.dtype.is_floating_point)
    for size in {dtype.itemsize for dtype in counts}:
        usual = max((dtype for dtype in counts if dtype.itemsize == size), key=lambda dtype: counts[dtype])
        same_size = (info for info in infos if info.dtype.is_floating_point and info.dtype.itemsize == size)
        problems += [f"{info.name} is {info.dtype}, others are {usual}" for info in same_size if info.dtype != usual]
    if problems:
        raise CheckpointError(
            "weights must be floating-point numbers, of one dtype per element size; fetch the checkpoint again, or save it "
            "in one dtype:\n  " + listed(problems)
        )


def _read_tasks(plan: Plan, infos: Mapping[str, TensorInfo], absent: frozenset[str]) -> list[ReadTask]:
    named = ((item, transfer, item.hf[transfer.part]) for item in plan.items for transfer in item.transfers)
    return [ReadTask(infos[name], transfer, item.local.data) for item, transfer, name in named if name not in absent]


def _zero_unfed(plan: Plan, absent: frozenset[str]) -> None:
    for item in plan.items:
        fed = sum(transfer.elements for transfer in item.transfers)
        if fed < prod(item.local.data.shape) and not absent.intersection(item.hf):
            item.local.data.zero_()


def _synchronize(tasks: Sequence[ReadTask]) -> None:
    for device in {task.target.device for task in tasks if task.target.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def _refuse(plan: Plan, mismatched: tuple[str, ...]) -> None:
    aliases = sorted(set(mismatched) & plan.aliases.keys())
    if aliases:
        pairs = [f"{name} differs from {plan.aliases[name]}" for name in aliases]
        raise CheckpointError(
            "copies of a tensor in files (tied embeddings, or in a multi-token-prediction layer) must be equal bit for bit; "
            "set tie_word_embeddings to false or mtp_num_layers to 0, or remove the copy:\n  " + listed(pairs)
        )
    if mismatched:
        raise ParityError("these tensors differ from the source after the import:\n  " + listed(list(mismatched)))


def refuse_nonfinite(plan: Plan, absent: frozenset[str] = frozenset()) -> None:
    """Raises the same CheckpointError on every rank, naming tensors whose parameters hold NaN or infinity. Collective."""
    verdicts = [is_finite(item.local.data) for item in plan.items]
    answers = torch.stack(verdicts).tolist() if verdicts else []
    items = [item for item, finite in zip(plan.items, answers, strict=True) if not finite]
    boxes = [(item.hf[t.part], native_box(item.local.data, t)) for item in items for t in item.transfers if t.elements]
    bad = [name for name, box in boxes if name not in absent and not box.float().isfinite().all()]
    names = sorted(set(chain.from_iterable(collectives.all_gather(bad))))
    if names:
        raise CheckpointError(
            "weights must be finite numbers; these hold NaN or infinity, or values too large for the parameters' dtype; mend the "
            "checkpoint, or set conversion.allow_nonfinite=true:\n  " + listed(names)
        )


def _merged(spans: Mapping[Path, list[tuple[int, int]]] | Spans) -> Spans:
    """Returns the same pages with adjacent and overlapping spans merged."""
    out: Spans = {}
    for file, entries in spans.items():
        joined: list[tuple[int, int]] = []
        for start, stop in sorted(entries):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
            else:
                joined.append((start, stop))
        out[str(file)] = joined
    return out


def _by_node(found: Iterable[tuple[str, Spans]]) -> tuple[int, ...]:
    """Returns the bytes of distinct pages that each node's ranks touched; nodes in the order of their first ranks."""
    nodes: dict[str, Spans] = {}
    for node, spans in found:
        for file, entries in spans.items():
            nodes.setdefault(node, {}).setdefault(file, []).extend(entries)
    return tuple(
        sum(stop - start for entries in _merged(spans).values() for start, stop in entries) * PAGE for spans in nodes.values()
    )
