"""Export to files: every rank writes the boxes it owns at their places, then all copies are compared with what was written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from megabridge import agreement
from megabridge.checkpoint import folders
from megabridge.checkpoint.hf import Writer
from megabridge.checkpoint.safetensors import TensorInfo, read_header
from megabridge.conversion.compare import Difference, compare, to_file
from megabridge.conversion.importer import Progress, silent
from megabridge.conversion.plan import Plan, Spec
from megabridge.conversion.report import Report
from megabridge.conversion.writer import Shard, plan_shards, reserve, write_index
from megabridge.errors import CheckpointError, ParityError, listed
from megabridge.mapping import natural

Dtypes = Mapping[str, torch.dtype] | torch.dtype | None


def export_specs(plan: Plan, dtypes: Dtypes, aliases: frozenset[str]) -> dict[str, Spec]:
    """The tensors to write, in natural order: in one dtype, one by name, or the parameters'; `aliases` are written besides."""
    specs = dict(plan.tensors) | {alias: plan.tensors[plan.aliases[alias]] for alias in aliases}
    if isinstance(dtypes, torch.dtype):
        specs = {name: replace(spec, dtype=dtypes) for name, spec in specs.items()}
    elif dtypes is not None:
        specs = {name: replace(spec, dtype=dtypes.get(name, spec.dtype)) for name, spec in specs.items()}
    return {name: specs[name] for name in sorted(specs, key=natural)}


@torch.no_grad()
def export_weights(
    plan: Plan,
    path: Path,
    *,
    write_assets: Callable[[Path], None],
    dtypes: Dtypes = None,
    aliases: frozenset[str] = frozenset(),
    max_shard_size: str | int = "5GB",
    verify: bool = True,
    progress: Progress = silent,
) -> Report:
    """Publishes the model as a Hugging Face folder at `path`. Collective; all ranks must see the same file system.

    Everything is written into a hidden folder beside `path`, read back and compared, made durable, and renamed last;
    `write_assets(folder)` adds config and tokenizer on rank 0. Raises the same CheckpointError or ParityError on every rank; then
    nothing is published and what was at `path` stays.
    """
    begin = time.perf_counter()
    partial = folders.partial_of(path)
    shards = plan_shards(partial, export_specs(plan, dtypes, aliases), max_shard_size)
    infos = {name: info for shard in shards for name, info in shard.tensors.items()}
    try:
        agreement.on_rank_zero("reserving space for the export", lambda: _reserve(partial, shards))
        with agreement.together("writing weights"):
            written = _write(plan, infos, progress)
        copied = sum(agreement.gather(written))
        seconds = time.perf_counter() - begin
        found, verify_seconds = _verify(plan, partial, shards) if verify else (Difference((), 0.0, 0), 0.0)
        begin = time.perf_counter()
        agreement.on_rank_zero("publishing the export", lambda: _publish(path, shards, write_assets))
    except BaseException:
        if agreement.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    seconds += time.perf_counter() - begin
    size = sum(info.nbytes for info in infos.values())
    return Report(len(infos), size, copied, seconds, verify_seconds, found.mismatched, found.max_abs, verify)


def _reserve(partial: Path, shards: list[Shard]) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    reserve(partial, shards)


def _publish(path: Path, shards: list[Shard], write_assets: Callable[[Path], None]) -> None:
    partial = folders.partial_of(path)
    write_index(partial, shards)
    write_assets(partial)
    folders.commit(path, replace=True)


def _write(plan: Plan, infos: Mapping[str, TensorInfo], progress: Progress) -> int:
    targets: dict[str, list[str]] = {name: [name] for name in plan.tensors}
    for alias, name in plan.aliases.items():
        if alias in infos:
            targets[name].append(alias)
    total = sum(t.elements * infos[item.hf[t.part]].dtype.itemsize for item in plan.items if item.is_writer for t in item.transfers)
    try:
        with Writer() as writer:
            for item in plan.items:
                for transfer in item.transfers if item.is_writer else ():
                    for name in targets[item.hf[transfer.part]]:
                        writer.write(infos[name], transfer, item.live.data)
                progress(writer.bytes_written, total)
            writer.sync()
            return writer.bytes_written
    except OSError as error:
        raise CheckpointError(
            f"writing the export failed: {error.strerror} ({error.filename or 'in a shard'}); nothing was published."
        ) from error


def _verify(plan: Plan, partial: Path, shards: list[Shard]) -> tuple[Difference, float]:
    begin = time.perf_counter()
    with agreement.together("reading the export back"):
        infos = {name: info for shard in shards for name, info in _headers(partial, shard).items()}
    found = compare(plan, infos, to_file)
    if found.mismatched:
        raise ParityError(
            "these tensors differ from the model after the export; nothing was published:\n  " + listed(list(found.mismatched))
        )
    return found, time.perf_counter() - begin


def _headers(partial: Path, shard: Shard) -> Mapping[str, TensorInfo]:
    found = read_header(partial / shard.name)
    if found != shard.tensors:
        raise CheckpointError(f"{partial / shard.name} has another header than was written; nothing was published.")
    return found
