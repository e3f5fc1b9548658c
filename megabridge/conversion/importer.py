"""Import: each rank copies exactly the boxes it owns out of the files. No collective moves weights, no whole tensor is held."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch

from megabridge import agreement
from megabridge.checkpoint.hf import Reader
from megabridge.checkpoint.safetensors import TensorInfo
from megabridge.conversion.compare import compare, to_native
from megabridge.conversion.plan import Item, Plan, check_source
from megabridge.conversion.report import Report
from megabridge.errors import CheckpointError, ParityError, listed

Progress = Callable[[int, int], None]  # bytes done and bytes in all, of this rank


def silent(done: int, total: int) -> None:
    """A progress report that shows nothing."""


@torch.no_grad()
def import_weights(
    plan: Plan,
    infos: Mapping[str, TensorInfo],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    verify: bool = True,
    progress: Progress = silent,
) -> Report:
    """Fills this rank's parameters from a folder's tensors (see `find_tensors`), cast to the parameters' dtype. Collective.

    Elements that no tensor feeds (vocabulary padding) become zero. Raises MappingError before anything is copied when names or
    shapes differ, CheckpointError for damaged files, ParityError when a copy differs; the same on every rank.
    """
    begin = time.perf_counter()
    with agreement.together("checking the source"):
        absent = check_source(plan, infos, allow_missing=allow_missing, allow_unexpected=allow_unexpected)
    with agreement.together("reading weights"), Reader(infos.values()) as reader:
        total = plan.owned_bytes
        for item in plan.items:
            _fill(reader, infos, item, absent)
            progress(reader.bytes_copied, total)
        reader.finish()
    copied = sum(agreement.gather(reader.bytes_copied))
    seconds = time.perf_counter() - begin
    names = [name for name in plan.tensors if name not in absent]
    size = sum(infos[name].nbytes for name in names)
    if not verify:
        return Report(len(names), size, copied, seconds, 0.0, (), 0.0, False)
    begin = time.perf_counter()
    found = compare(plan, infos, to_native, absent=absent)
    aliases = sorted(set(found.mismatched) & plan.aliases.keys())
    if aliases:
        pairs = [f"{name} differs from {plan.aliases[name]}" for name in aliases]
        raise CheckpointError(
            "the config ties embedding and output weights, so the file's copies must be equal bit for bit; set "
            "tie_word_embeddings to false or remove the copy:\n  " + listed(pairs)
        )
    if found.mismatched:
        raise ParityError("these tensors differ from the source after the import:\n  " + listed(list(found.mismatched)))
    return Report(len(names), size, copied, seconds, time.perf_counter() - begin, found.mismatched, found.max_abs, True)


def _fill(reader: Reader, infos: Mapping[str, TensorInfo], item: Item, absent: frozenset[str]) -> None:
    target = item.live.data
    fed = sum(transfer.elements for transfer in item.transfers)
    if fed < prod(target.shape) and not absent.intersection(item.hf):
        target.zero_()
    for transfer in item.transfers:
        name = item.hf[transfer.part]
        if name not in absent:
            reader.read(infos[name], transfer, target)
