"""Adds adapters to a model in memory, reads them from a PEFT folder and writes them to one. Every function is collective."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from megabridge.bridge.source import ModelSource, dtype_named
from megabridge.bridge.state import BridgeState, read_folders
from megabridge.bridge.weights import Model, model_plan
from megabridge.conversion.export_plan import export_specs, plan_export
from megabridge.conversion.exporter import export_weights
from megabridge.conversion.importer import import_weights
from megabridge.conversion.parameters import ADAPTER, collect_parameters
from megabridge.conversion.plan import Plan, make_plan
from megabridge.conversion.report import Report
from megabridge.conversion.stream import Stream
from megabridge.errors import ConfigError
from megabridge.loggers.bars import bytes_bar
from megabridge.native.source_record import SourceRecord
from megabridge.parallel import collectives
from megabridge.peft import LoRA
from megabridge.peft import folder as peft_folder
from megabridge.peft.attach import adapted, attach
from megabridge.peft.merge import adapters
from megabridge.peft.rules import AdapterMap, AdapterTarget
from megabridge.storage import regular_files

Peft = LoRA | str | Path


def add(source: ModelSource, state: BridgeState, model: Model, peft: LoRA, *, seed: int) -> list[torch.nn.Module]:
    """See AutoBridge.add_adapters."""
    attach(model, source.family, source.native, peft, seed=seed)
    state.peft = peft
    return list(model)


def adapt(source: ModelSource, state: BridgeState, model: Model, peft: Peft, *, seed: int = 1234) -> list[torch.nn.Module]:
    """Adds new adapters with the settings `peft`, or those of the PEFT folder `peft`."""
    if isinstance(peft, LoRA):
        return add(source, state, model, peft, seed=seed)
    load(source, state, model, peft)
    return list(model)


def adapter_plan(source: ModelSource, model: Model) -> Plan:
    """Returns the conversion plan of a model's adapters, under PEFT's names. Raises ConfigError where the model has none."""
    return make_plan(adapted(source.family, _peft_of(model)), source.native, collect_parameters(model, adapters=True))


def _peft_of(model: Model) -> LoRA:
    own = [adapter.lora for adapter in adapters(model)][:1]
    of_all_ranks = [lora for rank in collectives.all_gather(own) for lora in rank]
    if not of_all_ranks:
        raise ConfigError("the model has no adapters; give it some with add_adapters, or to_megatron_model(peft=...).")
    return of_all_ranks[0]


def load(source: ModelSource, state: BridgeState, model: Model, path: str | Path, *, verify: bool = True,
         allow_nonfinite: bool = False, show_progress: bool = True) -> Report:  # fmt: skip
    """See AutoBridge.load_hf_adapter."""
    with collectives.raise_together("opening the adapter"):
        folder = regular_files.expand(path)
        found, infos = peft_folder.read_config(folder), peft_folder.find_weights(folder)
        modules = peft_folder.modules_of(infos)
        rules = AdapterMap(source.family, found)
        stacked = {name for name in modules if found.target_parameters and rules.is_wrapper(name)}
        peft_folder.check_rank(infos, found.r, is_stacked=bool(found.target_parameters))
        state.note_source(folder)
    if not any(collectives.all_gather(bool(collect_parameters(model, adapters=True)))):
        linears = tuple(name for name in modules if name not in stacked)
        add(source, state, model, replace(found, target_modules=linears, exclude_modules=()), seed=1234)
    peft = _peft_of(model)
    different = [
        f"{name}={theirs!r}, here {ours!r}"
        for name in ("r", "lora_alpha", "use_rslora", "use_dora")
        if (theirs := getattr(found, name)) != (ours := getattr(peft, name))
    ]
    if different:
        raise ConfigError(f"{folder} must have the settings of this model's adapters; it has {', '.join(different)}.")
    plan = adapter_plan(source, model)
    with bytes_bar("import", show=show_progress and collectives.rank() == 0) as progress:
        report = import_weights(plan, infos, verify=verify, allow_nonfinite=allow_nonfinite, progress=progress)
    casts = SourceRecord.of(infos, aliases=()).held_in({name: spec.dtype for name, spec in plan.tensors.items()}).casts
    state.print_casts("rounded, because the model's adapters can't hold what the files have", casts)
    return replace(report, rounded=casts)


def save(source: ModelSource, state: BridgeState, model: Model, path: Path, *, base_model_name_or_path: str | None = None,
         weight_dtype: torch.dtype | str | None = None, verify: bool = True, allow_nonfinite: bool = False, writer: str = "shared",
         show_progress: bool = True) -> Report:  # fmt: skip
    """See AutoBridge.save_hf_adapter."""
    plan = adapter_plan(source, model)
    targets, named = _named(source, state, model, plan)
    base = base_model_name_or_path or source.location
    is_transposed = any(target.is_transposed for target in targets)

    def write(folder: Path) -> None:
        peft_folder.write_config(folder, named, base=base, revision=source.revision, is_transposed=is_transposed)

    export = plan_export(
        plan,
        path,
        dtypes=dtype_named(weight_dtype),
        only=peft_folder.WEIGHTS,
        writer=writer,
        sources=read_folders(source, state),
    )
    with bytes_bar("export", show=show_progress and collectives.rank() == 0) as progress:
        return export_weights(export, write_assets=write, verify=verify, allow_nonfinite=allow_nonfinite, progress=progress)


def export_size(source: ModelSource, model: Model, weight_dtype: torch.dtype | str | None) -> int:
    """See AutoBridge.export_size."""
    specs = export_specs(adapter_plan(source, model), dtype_named(weight_dtype), frozenset())
    return sum(prod(spec.shape) * spec.dtype.itemsize for spec in specs.values())


def _named(source: ModelSource, state: BridgeState, model: Model, plan: Plan) -> tuple[list[AdapterTarget], LoRA]:
    """Returns the weights that the adapter plan's tensors adapt, and the model's settings with the names PEFT needs for them."""
    rules, base = plan.family.weights, model_plan(source, state, model)
    assert isinstance(rules, AdapterMap)
    weights = {record.name.partition(ADAPTER)[0] + ".weight" for held in plan.records for record in held}
    targets = [target for weight in sorted(weights) if (target := rules.target(weight, plan.dims)) is not None]
    adapted = {target.parameter for target in targets} | set(peft_folder.modules_of(plan.tensors))
    linears = {name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")}
    natives = {record.name for held in base.records for record in held if record.name.endswith(".weight")}
    parameters = {name for native in natives if (name := rules.parameter(native, plan.dims)) is not None}
    return targets, peft_folder.explicit(
        _peft_of(model), {name: name in adapted for name in linears}, {name: name in adapted for name in parameters}
    )


def stream(source: ModelSource, model: Model, *, cpu: bool, weight_dtype: torch.dtype | str | None, bucket_bytes: int) -> Stream:
    """See AutoBridge.export_adapter_weights."""
    plan = adapter_plan(source, model)
    return Stream(plan, export_specs(plan, dtype_named(weight_dtype), frozenset()), cpu=cpu, bucket_bytes=bucket_bytes)
