"""Moves the weights of a Hugging Face model from files to a model in memory, and from there to files or other programs.

Every function is collective unless it says otherwise: all ranks call it with equal arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from megabridge.bridge import source as sources
from megabridge.bridge.source import ModelSource, dtype_named
from megabridge.bridge.state import BridgeState, plan_of, read_folders
from megabridge.conversion import source_dtypes, tasks
from megabridge.conversion.encoding import quantization_for
from megabridge.conversion.export_plan import Dtypes, export_specs, plan_export
from megabridge.conversion.exporter import export_weights
from megabridge.conversion.importer import import_weights
from megabridge.conversion.parameters import collect_parameters
from megabridge.conversion.passthrough import Passthrough, with_passthrough
from megabridge.conversion.plan import Plan, TensorSpec, check_source
from megabridge.conversion.report import Report
from megabridge.conversion.stream import Stream
from megabridge.conversion.tasks import Box, ConversionTask
from megabridge.errors import ConfigError, MappingError, listed
from megabridge.hf import assets, resolve
from megabridge.hf.dtypes import Casts, counted, holds
from megabridge.hf.dtypes import name as name_of
from megabridge.hf.quantised_weights import find_weights
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import Way, stored_tensors
from megabridge.loggers.bars import bytes_bar
from megabridge.native import digests
from megabridge.native.source_record import SourceRecord
from megabridge.parallel import collectives
from megabridge.peft.merge import with_merged

Model = Sequence[torch.nn.Module]
WeightDtype = torch.dtype | Literal["source"] | str | None
WriteAssets = Callable[[Path, str | None, dict[str, Any] | None], None]
"""Called on one rank with (folder, dtype for config.json, quantization_config for config.json)."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The keywords of AutoBridge.save_hf_pretrained that say how weights are written."""

    strict: bool = True
    weight_dtype: WeightDtype = None
    max_shard_size: str | int | None = None
    verify: bool = True
    allow_nonfinite: bool = False
    writer: str = "shared"
    quantization: str | None = None
    merge_adapter_weights: bool = True
    show_progress: bool = True


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """The keywords of AutoBridge.export_hf_weights that say what is sent, and how."""

    conversion_tasks: Sequence[ConversionTask] | None
    merge_adapter_weights: bool
    weight_dtype: WeightDtype
    cpu: bool
    bucket_bytes: int
    consumers: Collection[int] | None


def model_plan(source: ModelSource, state: BridgeState, model: Model) -> Plan:
    """Returns the conversion plan of a model; it is reused for models of the same layout."""
    return plan_of(source, state, collect_parameters(model))


def outgoing_plan(source: ModelSource, state: BridgeState, model: Model, *, merge: bool) -> Plan:
    """Returns the plan of an export: with `merge`, of the weights with their adapters merged."""
    plan = model_plan(source, state, model)
    return with_merged(plan, model) if merge else plan


# ---------------------------------------------------------------------- from files


def load(source: ModelSource, state: BridgeState, model: Model, hf_path: str | Path | None = None, *, revision: str | None = None,
         strict: bool = True, allow_missing: Sequence[str] = (), allow_unexpected: Sequence[str] = (), allow_bin: bool = False,
         allow_nonfinite: bool = False, reader: Way = "auto", dedupe: bool = False, verify: bool = True,
         show_progress: bool = True, digest: bool = False) -> Report:  # fmt: skip
    """See AutoBridge.load_hf_weights."""
    infos = open_weights(source, state, hf_path, revision, allow_bin=allow_bin)
    plan = model_plan(source, state, model)
    with bytes_bar("import", show=show_progress and collectives.rank() == 0) as progress:
        report = import_weights(
            plan,
            infos,
            allow_missing=allow_missing if strict else ("*",),
            allow_unexpected=allow_unexpected if strict else ("*",),
            allow_nonfinite=allow_nonfinite,
            way=reader,
            dedupe=dedupe,
            verify=verify,
            progress=progress,
        )
    state.import_digest = digests.of_tensors(one for info in infos.values() for one in stored_tensors(info)) if digest else ""
    names = [name for name in (*plan.tensors, *plan.aliases) if name in infos]
    patterns = [*source.family.ignored, *allow_missing, *allow_unexpected]
    with collectives.raise_together("opening passthrough tensors"):
        state.set_passthrough(Passthrough.of({name: info for name, info in infos.items() if plan.is_passthrough(name)}))
    differing = (infos.keys() - plan.aliases.keys()) ^ (plan.tensors.keys() | state.passthrough.infos.keys())
    left_out = [name for name in differing if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    record = SourceRecord.of(infos, aliases=plan.aliases.keys() & infos.keys(), left_out=sorted(left_out))
    state.record = record.held_in(_held(plan, names))
    state.import_report = replace(
        report, rounded=state.record.casts, dtypes=counted([infos[name].dtype for name in plan.tensors if name in infos])
    )
    state.print_casts("rounded, because the model's parameters can't hold what the files have", state.record.casts)
    return state.import_report


def loaded(source: ModelSource, state: BridgeState, model: Model, hf_path: str | Path | None = None, *,
           revision: str | None = None) -> list[torch.nn.Module]:  # fmt: skip
    """`load` as a provider's pre-wrap hook."""
    load(source, state, model, hf_path, revision=revision)
    return list(model)


def keep_dtypes(source: ModelSource, state: BridgeState, model: Model, hf_path: str | Path | None = None, *,
                revision: str | None = None, allow_bin: bool = False) -> list[torch.nn.Module]:  # fmt: skip
    """See AutoBridge.keep_dtypes."""
    infos = open_weights(source, state, hf_path, revision, allow_bin=allow_bin)
    source_dtypes.keep_source_dtypes(model_plan(source, state, model), infos)
    return list(model)


def note_rounding(source: ModelSource, state: BridgeState, model: Model, casts: Casts) -> None:
    """Records what the load of a native checkpoint rounded, if anything, for later exports."""
    if casts and state.record is not None:
        plan = model_plan(source, state, model)
        state.record = state.record.held_in(_held(plan, [*plan.tensors, *_aliases(state, plan)]))


def open_weights(source: ModelSource, state: BridgeState, hf_path: str | Path | None, revision: str | None, *,
                 allow_bin: bool) -> dict[str, TensorInfo]:  # fmt: skip
    """Returns the tensors of `hf_path`, or of the source itself, after checking their headers."""
    if source.location is None and hf_path is None:
        raise ConfigError("a bridge made from a config has no weights; give hf_path.")
    with collectives.raise_together("opening the source"):
        allow_bin = allow_bin or source.allow_bin
        if hf_path is None and revision in (None, source.revision):
            folder = sources.weights_folder(source, allow_bin=allow_bin)
        else:
            what = f"revision={revision!r}" if hf_path is None else f"hf_path={str(hf_path)!r}"
            folder = resolve.resolve(
                str(source.location if hf_path is None else hf_path),
                revision=revision or source.revision, token=source.token, code=source.trust_remote_code, allow_bin=allow_bin,
            )  # fmt: skip
            sources.check_same(source, assets.read_config(folder), what)
        state.note_source(folder)
        return find_weights(folder, allow_bin=allow_bin)


# ---------------------------------------------------------------------- into files


def save(source: ModelSource, state: BridgeState, model: Model, path: Path, options: ExportOptions, *,
         source_path: str | Path | None = None, weights_only: bool = False) -> Report:  # fmt: skip
    """See AutoBridge.save_hf_pretrained, and save_hf_weights with `weights_only`."""
    assets_of, read_from = source, read_folders(source, state)
    if source_path is not None:
        with collectives.raise_together("opening source_path"):
            assets_of = sources.from_pretrained(
                source_path, token=source.token, trust_remote_code=source.trust_remote_code, ignore_keys=source.ignore_keys
            )
            sources.check_same(source, assets_of.config, f"source_path={str(source_path)!r}")
        assert assets_of.folder is not None
        read_from = [*read_from, assets_of.folder.absolute()]

    def write(folder: Path, dtype: str | None, quantization: dict[str, Any] | None) -> None:
        if not weights_only:
            sources.write_hf_assets(assets_of, folder, dtype, quantization)

    plan = outgoing_plan(source, state, model, merge=options.merge_adapter_weights)
    return _export(source, state, plan, path, write, read_from, options)


def _export(source: ModelSource, state: BridgeState, plan: Plan, path: Path, write: WriteAssets, read_from: Sequence[Path],
            options: ExportOptions) -> Report:  # fmt: skip
    if options.strict and state.record is not None and state.record.left_out:
        raise MappingError(
            "the import was not strict, so the export would differ from its source; pass strict=False to publish it all the "
            "same:\n  " + listed(list(state.record.left_out))
        )
    plan = with_passthrough(plan, state.passthrough, path.absolute().parent)
    aliases = _aliases(state, plan)
    dtypes = _dtypes(state, plan, options.weight_dtype)
    specs = export_specs(plan, dtypes, aliases)
    casts = _casts(state, plan, specs)
    state.print_casts("exported with less precision than the source had", casts)
    # A config.json may state another dtype than its files have: "source" keeps what it states.
    name = None if options.weight_dtype == "source" else _usual_dtype(specs)
    with collectives.raise_together("choosing what to quantise"):
        quantized, said = quantization_for(plan, options.quantization, source.config)
    export = plan_export(
        plan,
        path,
        dtypes=dtypes,
        aliases=aliases,
        files=_files(state, specs) if quantized is None and options.max_shard_size is None else None,
        max_shard_size=options.max_shard_size,
        writer=options.writer,
        quantization=quantized,
        sources=read_from,
    )
    with bytes_bar("export", show=options.show_progress and collectives.rank() == 0) as progress:
        report = export_weights(
            export,
            write_assets=lambda folder: write(folder, name, said),
            verify=options.verify,
            allow_nonfinite=options.allow_nonfinite,
            progress=progress,
        )
    return replace(report, rounded=casts, cast=_lossy(plan, specs))


def _lossy(plan: Plan, specs: Mapping[str, TensorSpec]) -> Casts:
    """The tensors that are written in a dtype which can't hold their parameters' values."""
    held = _held(plan, list(specs))
    return {name: (held[name], spec.dtype) for name, spec in specs.items() if not holds(spec.dtype, held[name])}


@contextmanager
def as_exported(source: ModelSource, state: BridgeState, model: Model, weight_dtype: WeightDtype) -> Iterator[None]:
    """See AutoBridge.as_exported."""
    plan = model_plan(source, state, model)
    dtypes = {name: spec.dtype for name, spec in export_specs(plan, _dtypes(state, plan, weight_dtype), frozenset()).items()}
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for item in plan.items:
        data, written = item.local.data, {dtypes[name] for name in item.hf}
        if len(written) == 1 and not holds(dtype := written.pop(), data.dtype):
            kept.append((data, data.to("cpu", copy=True)))
            data.copy_(data.to(dtype))
    try:
        yield
    finally:
        for data, own in kept:
            data.copy_(own)


def export_size(source: ModelSource, state: BridgeState, model: Model, weight_dtype: WeightDtype) -> int:
    """See AutoBridge.export_size."""
    plan = model_plan(source, state, model)
    specs = export_specs(plan, _dtypes(state, plan, weight_dtype), _aliases(state, plan))
    own = sum(prod(spec.shape) * spec.dtype.itemsize for spec in specs.values())
    return own + sum(info.nbytes for info in state.passthrough.infos.values())


def _casts(state: BridgeState, plan: Plan, specs: Mapping[str, TensorSpec]) -> Casts:
    """Returns the tensors of an export with less precision than in the source, lost in a parameter or in the export itself."""
    if state.record is None:
        return {}
    written = {name: spec.dtype for name, spec in specs.items()}
    found = state.record.held_in(_held(plan, list(specs))).held_in(written).casts
    return {name: pair for name, pair in found.items() if name in specs}


def _files(state: BridgeState, specs: Mapping[str, TensorSpec]) -> Mapping[str, Sequence[str]] | None:
    """Returns the tensors of each of the source's files, where an export of `specs` can be split like them."""
    return None if state.record is None else state.record.files_of({name: spec.dtype for name, spec in specs.items()})


def _aliases(state: BridgeState, plan: Plan) -> frozenset[str]:
    """Returns the tied copies that an export contains: those that the source had."""
    return frozenset() if state.record is None else state.record.aliases & plan.aliases.keys()


def _dtypes(state: BridgeState, plan: Plan, weight_dtype: WeightDtype) -> Dtypes:
    """Returns the dtypes that `weight_dtype` stands for: one for all, one per tensor name, or None for those of the parameters."""
    if weight_dtype != "source":
        return dtype_named(weight_dtype)
    if state.record is None:
        raise ConfigError("weight_dtype='source' needs an earlier import by this bridge; load weights or name a dtype.")
    return state.record.dtypes([*plan.tensors, *_aliases(state, plan)])


# ---------------------------------------------------------------------- to other programs, without files


def stream(source: ModelSource, state: BridgeState, model: Model, options: StreamOptions) -> Stream:
    """See AutoBridge.export_hf_weights."""
    plan = outgoing_plan(source, state, model, merge=options.merge_adapter_weights)
    with collectives.raise_together("starting the stream"):
        dtypes, chosen = _dtypes(state, plan, options.weight_dtype), options.conversion_tasks
        specs = export_specs(plan, dtypes, _aliases(state, plan)) if chosen is None else tasks.task_specs(plan, chosen, dtypes)
    state.print_casts("exported with less precision than the source had", _casts(state, plan, specs))
    return Stream(plan, specs, cpu=options.cpu, bucket_bytes=options.bucket_bytes, consumers=options.consumers)


def shards(source: ModelSource, model: Model, *, replicas: bool) -> Iterator[tuple[str, Box, torch.Tensor]]:
    """See AutoBridge.export_hf_shards. Not collective."""
    return tasks.shards(source.family, source.native, model, replicas=replicas)


def conversion_tasks(
    source: ModelSource, state: BridgeState, model: Model, hf_path: str | Path | None = None
) -> list[ConversionTask]:
    """See AutoBridge.get_conversion_tasks."""
    plan, dtypes = model_plan(source, state, model), None
    aliases = _aliases(state, plan)
    if hf_path is not None:
        infos = open_weights(source, state, hf_path, None, allow_bin=False)
        check_source(plan, infos)
        aliases = frozenset(plan.aliases.keys() & infos.keys())
        dtypes = {name: info.dtype for name, info in infos.items()}
    return tasks.make_tasks(plan, model, export_specs(plan, dtypes, aliases))


def _held(plan: Plan, names: Sequence[str]) -> dict[str, torch.dtype]:
    """Returns the dtypes of the parameters that hold the tensors `names`."""
    return {name: plan.tensors[plan.aliases.get(name, name)].dtype for name in names}


def _usual_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """Returns the dtype that most elements of an export have, as config.json spells it."""
    elements: Counter[torch.dtype] = Counter()
    for spec in specs.values():
        elements[spec.dtype] += prod(spec.shape)
    return name_of(elements.most_common(1)[0][0])
