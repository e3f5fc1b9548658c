"""Exports to files: every rank writes the boxes that it owns in place, then all copies are compared with the written files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial as bound
from itertools import chain
from pathlib import Path
from typing import IO

import torch

from megabridge.conversion import manifest
from megabridge.conversion.compare import Convert, Difference, Pair, compare
from megabridge.conversion.earlier_export import Earlier, check_hidden, check_unchanged
from megabridge.conversion.encoding import Encoder
from megabridge.conversion.export_plan import ExportPlan
from megabridge.conversion.file_writer import Writer, reserve, space_named, write_index
from megabridge.conversion.gather import Gathered, compare_gathered
from megabridge.conversion.importer import Progress, silent
from megabridge.conversion.manifest import digests
from megabridge.conversion.read_loop import ReadTask
from megabridge.conversion.report import Report
from megabridge.conversion.shards import Shard
from megabridge.errors import CheckpointError, MegabridgeError, ParityError, listed
from megabridge.hf.dtypes import counted
from megabridge.hf.safetensors_format import TensorInfo, read_header
from megabridge.mapping import Transfer, coalescible, natural, whole
from megabridge.parallel import collectives, process_groups
from megabridge.storage import folders

Boxes = Iterable[tuple[TensorInfo, Sequence[Transfer], torch.Tensor]]  # the arguments of `Writer.write`


@torch.no_grad()
def export_weights(
    export: ExportPlan,
    *,
    write_assets: Callable[[Path], None],
    verify: bool = True,
    allow_nonfinite: bool = False,
    progress: Progress = silent,
) -> Report:
    """Publishes the model as a Hugging Face folder at the plan's path. Collective.

    Everything is written to a hidden folder beside it, read back and compared (`verify`), made durable and finally renamed;
    `write_assets(folder)` adds config and tokenizer on rank 0. An earlier export there is replaced (see `Earlier`). Correct parts
    that a killed export left behind are reused.

    Raises the same CheckpointError or ParityError on every rank; then nothing is published and existing files stay. NaN and
    infinite values are refused unless `allow_nonfinite`.
    """
    begin = time.perf_counter()
    with _claimed(export.path, is_shared=export.is_shared) as earlier:
        try:
            kept = collectives.on_rank_zero("reserving space for the export", lambda: reserve(export.partial, export.shards))
            written = _write(export, kept, progress)
            of_all_ranks = collectives.all_gather(written)
            _refuse_nonfinite([] if allow_nonfinite else of_all_ranks)
            seconds = time.perf_counter() - begin
            found, verify_seconds = _verify(export) if verify else (Difference((), 0.0, 0), 0.0)
            begin = time.perf_counter()
            by_name = _digests(export, of_all_ranks)
            collectives.on_rank_zero("publishing the export", lambda: _publish(export, write_assets, by_name, earlier))
        except (MegabridgeError, OSError):
            if collectives.rank() == 0:
                shutil.rmtree(export.partial, ignore_errors=True)
            raise
    seconds += time.perf_counter() - begin
    return _report(export.infos, of_all_ranks, found, seconds, verify_seconds, is_verified=verify)


def _report(
    infos: Mapping[str, TensorInfo], of_all_ranks: list[Written], found: Difference, seconds: float, verify_seconds: float, *,
    is_verified: bool,
) -> Report:  # fmt: skip
    return Report(
        tensors=len(infos),
        bytes=sum(info.nbytes for info in infos.values()),
        bytes_copied=sum(written.bytes_written for written in of_all_ranks),
        seconds=seconds,
        verify_seconds=verify_seconds,
        mismatched=found.mismatched,
        max_abs_diff=found.max_abs,
        is_verified=is_verified,
        dtypes=counted([info.dtype for info in infos.values()]),
        bytes_kept=sum(written.bytes_kept for written in of_all_ranks),
    )


@contextmanager
def _claimed(path: Path, *, is_shared: bool) -> Iterator[Earlier | None]:
    """Locks `path` against other exports and, where it is shared, checks that every rank sees rank 0's folder. Collective.

    Yields what is at `path`, on rank 0; None elsewhere. The lock is removed, and the caller may remove files, only where all ranks
    got to the end: if one died, others may still be writing. Raises CheckpointError where what is there can't be replaced.
    """
    own: list[IO[str]] = []
    found: list[Earlier] = []

    def claim() -> str:
        check_hidden(path)
        file, token = folders.claim(path)
        own.append(file)
        found.append(Earlier.at(path))
        return token

    try:
        token = collectives.on_rank_zero("claiming the folder of the export", claim)
        with collectives.raise_together("opening the folder of the export"):
            if is_shared and collectives.rank() != 0:
                own.append(folders.join(path, token))
        earlier = found[0] if found else None
        check_unchanged(path, earlier, is_shared=is_shared)
        yield earlier
    except (MegabridgeError, OSError):
        _release(path, own)
        raise
    else:
        _release(path, own)
    finally:
        for file in own:
            file.close()


def _release(path: Path, own: list[IO[str]]) -> None:
    if own and collectives.rank() == 0:
        folders.release(path, own[0])


@dataclass(frozen=True, slots=True)
class Written:
    """A rank's result: bytes written, bytes found written already, tensors that aren't finite, and digests of tensors."""

    bytes_written: int
    bytes_kept: int
    nonfinite: Mapping[str, str]
    digests: Mapping[str, str]


def _own(export: ExportPlan) -> Generator[tuple[TensorInfo, Sequence[Transfer], torch.Tensor]]:
    """Yields the boxes that this rank writes into a shared folder."""
    plan, infos = export.plan, export.infos
    for item in plan.items:
        for group in coalescible(item.transfers) if item.is_writer else ():
            for name in plan.copies_of(item.hf[group[0].part], infos):
                yield infos[name], group, item.local.data


def _scales(export: ExportPlan) -> Boxes:
    """Yields the scales that this rank writes."""
    for name, tensor in export.encoder.scales():
        if collectives.rank() in export.writers[name]:
            yield export.infos[name], (whole(tensor.shape),), tensor


def _write(export: ExportPlan, kept: frozenset[Path], progress: Progress) -> Written:
    """Writes this rank's boxes into the reserved files; those in `kept` may hold some of them already. Collective."""
    plan, infos, writers, encoder = export.plan, export.infos, export.writers, export.encoder
    mine = [infos[name] for name, ranks in writers.items() if collectives.rank() in ranks]
    alone = [info for info in mine if len(writers[info.name]) == 1]
    total = sum(info.nbytes // len(writers[info.name]) for info in mine)  # the writers of a tensor have about equal parts
    with (
        collectives.raise_together("writing weights"),
        space_named(export.partial, export.shards),
        closing(_own(export) if export.is_shared else Gathered(plan, infos, encoder)) as boxes,
        Writer([info for info in mine if info.file in kept], encoder.encode) as writer,
    ):
        for info, group, data in chain(boxes, _scales(export)):
            writer.write(info, group, data)
            progress(writer.bytes_written + writer.bytes_kept, total)
        with ThreadPoolExecutor(1) as thread:  # syncs to disk while digests are computed
            synced = thread.submit(writer.sync)
            found = digests(alone)
            synced.result()
    return Written(writer.bytes_written, writer.bytes_kept, writer.nonfinite, found)


def _digests(export: ExportPlan, of_all_ranks: list[Written]) -> dict[str, str]:
    """Returns every tensor's digest. Collective: tensors that several ranks wrote are divided between these ranks."""
    several = [export.infos[name] for name, ranks in export.writers.items() if len(ranks) > 1]
    with collectives.raise_together("taking digests"):
        found = digests(manifest.share(several, export.writers))
    parts = [*collectives.all_gather(found), *(written.digests for written in of_all_ranks)]
    return {name: digest for part in parts for name, digest in part.items()}


def _refuse_nonfinite(of_all_ranks: list[Written]) -> None:
    found = {name: reason for written in of_all_ranks for name, reason in written.nonfinite.items()}
    if found:
        raise ParityError(
            "an exported model must hold finite numbers only, nothing was published; go back to an earlier step, or set "
            "conversion.allow_nonfinite=true (allow_nonfinite=True in Python):\n  "
            + listed([f"{name}: {found[name]}" for name in sorted(found, key=natural)])
        )


def _publish(export: ExportPlan, write_assets: Callable[[Path], None], found: Mapping[str, str], earlier: Earlier | None) -> None:
    assert earlier is not None  # rank 0's
    with space_named(export.partial, export.shards):
        write_index(export.partial, export.shards)
        write_assets(export.partial)
        manifest.write(export.partial, export.infos, found, process_groups.running())
        earlier.copy_kept(export.partial)
    folders.commit(export.path, replace=True)


def _verify(export: ExportPlan) -> tuple[Difference, float]:
    begin = time.perf_counter()
    with collectives.raise_together("reading the export back"):
        is_seen = export.is_shared or collectives.rank() == 0
        headers = [_headers(export.partial, shard) if is_seen else shard.tensors for shard in export.shards]
    infos = {name: info for tensors in headers for name, info in tensors.items()}
    if export.is_shared:
        scales = [ReadTask(infos[name], whole(tensor.shape), tensor) for name, tensor in export.encoder.scales()]
        found = compare(export.plan, infos, bound(_to_file, export.encoder), more=scales)
    else:
        found = compare_gathered(export.plan, infos, export.encoder)
    if found.mismatched:
        raise ParityError(
            "these tensors differ from the model after the export; nothing was published:\n  " + listed(list(found.mismatched))
        )
    return found, time.perf_counter() - begin


def _to_file(encoder: Encoder, task: ReadTask, part: Transfer, pair: Pair, convert: Convert) -> Pair:
    """Encodes the parameter's box as the file should hold it; quantised boxes are compared on the CPU."""
    ours, theirs = pair
    if task.info.name in encoder.dtypes:
        return encoder.encode(task.info, part, ours), theirs.cpu()
    return convert(ours, theirs.dtype), theirs.to(ours.device)


def _headers(partial: Path, shard: Shard) -> Mapping[str, TensorInfo]:
    found = read_header(partial / shard.name)
    if found != shard.tensors:
        raise CheckpointError(f"{partial / shard.name} has another header than was written; nothing was published.")
    return found
