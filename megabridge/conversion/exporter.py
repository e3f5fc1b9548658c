"""Export to files: every rank writes the boxes it owns at their places, then all copies are compared with what was written."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial as bound
from itertools import chain
from pathlib import Path
from typing import IO, Final

import torch

from megabridge.conversion import manifest
from megabridge.conversion.compare import Convert, Difference, Pair, compare
from megabridge.conversion.earlier_export import Earlier, check_apart, check_hidden, check_unchanged
from megabridge.conversion.encoding import Encoder, agree_on_encoder, scale_owners
from megabridge.conversion.file_writer import Shard, Writer, plan_shards, reserve, space_named, write_index
from megabridge.conversion.gather import Gathered, compare_gathered
from megabridge.conversion.importer import Progress, silent
from megabridge.conversion.manifest import digests
from megabridge.conversion.plan import Plan, TensorSpec
from megabridge.conversion.read_loop import ReadTask
from megabridge.conversion.report import Report
from megabridge.errors import CheckpointError, ConfigError, MegabridgeError, ParityError, listed
from megabridge.families.core.quantization import Quantization
from megabridge.hf.dtypes import counted
from megabridge.hf.safetensors_format import TensorInfo, read_header
from megabridge.mapping import Transfer, coalescible, natural, whole
from megabridge.native import checkpoint
from megabridge.parallel import collectives
from megabridge.storage import folders

Dtypes = Mapping[str, torch.dtype] | torch.dtype | None
WRITERS: Final = ("shared", "gather")
Boxes = Iterable[tuple[TensorInfo, Sequence[Transfer], torch.Tensor]]  # file, place in it, elements: what `Writer.write` takes


def export_specs(plan: Plan, dtypes: Dtypes, aliases: frozenset[str]) -> dict[str, TensorSpec]:
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
    max_shard_size: str | int | None = None,
    files: Mapping[str, Sequence[str]] | None = None,
    only: str | None = None,
    verify: bool = True,
    allow_nonfinite: bool = False,
    writer: str = "shared",
    quantization: Quantization | None = None,
    sources: Iterable[Path] = (),
    progress: Progress = silent,
) -> Report:
    """Publishes the model as a Hugging Face folder at `path`. Collective.

    With `writer="shared"` every rank writes what it owns, and all must see the same file system; with "gather" rank 0 is sent
    everything, and its file system alone counts.

    Everything is written into a hidden folder beside `path`, read back and compared, made durable, and renamed last;
    `write_assets(folder)` adds config and tokenizer on rank 0. `only` is the name of the one file of all weights, `files` say what
    is in which; else `max_shard_size` decides. An earlier export at `path` is replaced (see `Earlier`), unless the model was read
    from there, out of one of the folders `sources`. What a killed export left is used again where it is right. With a
    `quantization`, linears are of FP8.

    Raises the same CheckpointError or ParityError on every rank; then nothing is published and what was at `path` stays. NaN and
    infinite values are refused unless `allow_nonfinite`.
    """
    if writer not in WRITERS:
        raise ConfigError(f"writer={writer!r} must be one of {', '.join(WRITERS)}.")
    begin = time.perf_counter()
    partial = folders.partial_of(path := Path(os.path.realpath(path)))
    collectives.on_rank_zero("looking where the export goes", lambda: check_apart(path, sources))
    encoder = agree_on_encoder(plan, specs := export_specs(plan, dtypes, aliases), quantization, everything=writer == "gather")
    shards = plan_shards(partial, encoder.specs(specs), max_shard_size, only=only, files=files)
    infos = {name: info for shard in shards for name, info in shard.tensors.items()}
    writers = {name: [0] for name in infos} if writer == "gather" else _writers(plan, infos, encoder)
    with _claimed(path, is_shared=writer == "shared") as earlier:
        try:
            kept = collectives.on_rank_zero("reserving space for the export", lambda: reserve(partial, shards))
            with (
                collectives.raise_together("writing weights"),
                space_named(partial, shards),
                closing(Gathered(plan, infos, encoder) if writer == "gather" else _own(plan, infos)) as boxes,
            ):
                written = _write(chain(boxes, _scales(infos, writers, encoder)), infos, writers, kept, encoder, progress)
            everyones = collectives.all_gather(written)
            _refuse_nonfinite([] if allow_nonfinite else everyones)
            seconds = time.perf_counter() - begin
            found, verify_seconds = _verify(plan, partial, shards, encoder, writer) if verify else (Difference((), 0.0, 0), 0.0)
            begin = time.perf_counter()
            by_name = _digests(writers, infos, everyones)
            collectives.on_rank_zero("publishing the export", lambda: _publish(path, shards, write_assets, by_name, earlier))
        except (MegabridgeError, OSError):
            if collectives.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    seconds += time.perf_counter() - begin
    return _report(infos, everyones, found, seconds, verify_seconds, is_verified=verify)


def _report(
    infos: Mapping[str, TensorInfo], everyones: list[Written], found: Difference, seconds: float, verify_seconds: float, *,
    is_verified: bool,
) -> Report:  # fmt: skip
    return Report(
        tensors=len(infos),
        bytes=sum(info.nbytes for info in infos.values()),
        bytes_copied=sum(written.bytes_written for written in everyones),
        seconds=seconds,
        verify_seconds=verify_seconds,
        mismatched=found.mismatched,
        max_abs_diff=found.max_abs,
        is_verified=is_verified,
        dtypes=counted([info.dtype for info in infos.values()]),
        bytes_kept=sum(written.bytes_kept for written in everyones),
    )


@contextmanager
def _claimed(path: Path, *, is_shared: bool) -> Iterator[Earlier | None]:
    """No other export writes to `path` meanwhile, and, where it is shared, every rank sees the folder of rank 0. Collective.

    Yields what is there, to rank 0. Only an end that all ranks came to removes the lock, and lets the caller remove files: where
    one died, others may still write. Raises CheckpointError where what is there can't be replaced.
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
    """What one rank wrote into files, found there already, and found to be no finite number; the digests it took meanwhile."""

    bytes_written: int
    bytes_kept: int
    nonfinite: Mapping[str, str]
    digests: Mapping[str, str]


def _own(plan: Plan, infos: Mapping[str, TensorInfo]) -> Generator[tuple[TensorInfo, Sequence[Transfer], torch.Tensor]]:
    """The boxes that this rank writes into a shared folder."""
    for item in plan.items:
        for group in coalescible(item.transfers) if item.is_writer else ():
            for name in plan.carriers(item.hf[group[0].part], infos):
                yield infos[name], group, item.live.data


def _scales(infos: Mapping[str, TensorInfo], writers: Mapping[str, list[int]], encoder: Encoder) -> Boxes:
    """The scales that this rank writes."""
    for name, tensor in encoder.scales():
        if collectives.rank() in writers[name]:
            yield infos[name], (whole(tensor.shape),), tensor


def _write(boxes: Boxes, infos: Mapping[str, TensorInfo], writers: Mapping[str, list[int]], kept: frozenset[Path],
           encoder: Encoder, progress: Progress) -> Written:  # fmt: skip
    mine = [infos[name] for name, ranks in writers.items() if collectives.rank() in ranks]
    total = sum(info.nbytes // len(writers[info.name]) for info in mine)  # ranks have about equal parts
    with Writer([info for info in mine if info.file in kept], encoder.encode) as writer:
        for info, group, data in boxes:
            writer.write(info, group, data)
            progress(writer.bytes_written + writer.bytes_kept, total)
        alone = [info for info in mine if len(writers[info.name]) == 1]
        with ThreadPoolExecutor(1) as thread:  # the disk and a core work at the same time
            synced = thread.submit(writer.sync)
            found = digests(alone)
            synced.result()
        return Written(writer.bytes_written, writer.bytes_kept, writer.nonfinite, found)


def _writers(plan: Plan, infos: Mapping[str, TensorInfo], encoder: Encoder) -> dict[str, list[int]]:
    """The ranks that write each tensor into a shared folder."""
    owners = scale_owners(plan, encoder.dtypes)
    return {
        name: [owners[name]] if name in owners else sorted({source.rank for source in plan.sources[plan.aliases.get(name, name)]})
        for name in infos
    }


def _digests(writers: Mapping[str, list[int]], infos: Mapping[str, TensorInfo], everyones: list[Written]) -> dict[str, str]:
    """Every tensor's digest. Collective: those that several ranks wrote are taken now, by these ranks in turn."""
    several = [infos[name] for name, ranks in writers.items() if len(ranks) > 1]
    with collectives.raise_together("taking digests"):
        found = digests(manifest.share(several, writers))
    parts = [*collectives.all_gather(found), *(written.digests for written in everyones)]
    return {name: digest for part in parts for name, digest in part.items()}


def _refuse_nonfinite(everyones: list[Written]) -> None:
    found = {name: reason for written in everyones for name, reason in written.nonfinite.items()}
    if found:
        raise ParityError(
            "an exported model must hold finite numbers only, nothing was published; go back to an earlier step, or allow others "
            "with conversion.allow_nonfinite=true (allow_nonfinite=True in Python):\n  "
            + listed([f"{name}: {found[name]}" for name in sorted(found, key=natural)])
        )


def _publish(path: Path, shards: list[Shard], write_assets: Callable[[Path], None], found: Mapping[str, str],
             earlier: Earlier | None) -> None:  # fmt: skip
    partial = folders.partial_of(path)
    assert earlier is not None  # rank 0's
    with space_named(partial, shards):
        write_index(partial, shards)
        write_assets(partial)
        infos = {name: info for shard in shards for name, info in shard.tensors.items()}
        manifest.write(partial, infos, found, checkpoint.layout())
        earlier.carry(partial)
    folders.commit(path, replace=True)


def _verify(plan: Plan, partial: Path, shards: list[Shard], encoder: Encoder, writer: str) -> tuple[Difference, float]:
    begin = time.perf_counter()
    with collectives.raise_together("reading the export back"):
        is_seen = writer == "shared" or collectives.rank() == 0
        infos = {name: info for shard in shards for name, info in (_headers(partial, shard) if is_seen else shard.tensors).items()}
    if writer == "gather":
        found = compare_gathered(plan, infos, encoder)
    else:
        scales = [ReadTask(infos[name], whole(tensor.shape), tensor) for name, tensor in encoder.scales()]
        found = compare(plan, infos, bound(_to_file, encoder), more=scales)
    if found.mismatched:
        raise ParityError(
            "these tensors differ from the model after the export; nothing was published:\n  " + listed(list(found.mismatched))
        )
    return found, time.perf_counter() - begin


def _to_file(encoder: Encoder, job: ReadTask, part: Transfer, pair: Pair, convert: Convert) -> Pair:
    """The parameter's box as the file should hold it; quantised ones are compared on the CPU."""
    ours, theirs = pair
    if job.info.name in encoder.dtypes:
        return encoder.encode(job.info, part, ours), theirs.cpu()
    return convert(ours, theirs.dtype), theirs.to(ours.device)


def _headers(partial: Path, shard: Shard) -> Mapping[str, TensorInfo]:
    found = read_header(partial / shard.name)
    if found != shard.tensors:
        raise CheckpointError(f"{partial / shard.name} has another header than was written; nothing was published.")
    return found
