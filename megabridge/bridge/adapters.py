"""Adapters of a live model: made, read from a PEFT folder, and written into one."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch

from megabridge.bridge.source import dtype_named
from megabridge.bridge.weights import HFWeights, Model
from megabridge.conversion.exporter import export_specs, export_weights
from megabridge.conversion.importer import import_weights
from megabridge.conversion.parameters import ADAPTER, collect_parameters
from megabridge.conversion.plan import Plan, make_plan
from megabridge.conversion.report import Report
from megabridge.conversion.stream import BUCKET_BYTES, Stream
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


class HFAdapters(HFWeights):
    """What `AutoBridge` does with adapters: see `LoRA`, and PEFT for the folder."""

    def add_adapters(self, model: Model, peft: LoRA, *, seed: int = 1234) -> list[torch.nn.Module]:
        """Freezes a model's bare chunks, gives the linears that `peft` names an adapter each, and returns the chunks. Collective.

        A pre-wrap hook calls it, after the weights were loaded; to_megatron_provider(peft=...) registers one. The model says the
        same as before: B is zero. Raises the same ConfigError on every rank for names of no linear.
        """
        attach(model, self.family, self.native, peft, seed=seed)
        self.peft = peft
        return list(model)

    def adapt(self, model: Model, peft: Peft, *, seed: int = 1234) -> list[torch.nn.Module]:
        """`add_adapters`, where `peft` may be a PEFT folder as well: then its adapters. Collective."""
        if isinstance(peft, LoRA):
            return self.add_adapters(model, peft, seed=seed)
        self.load_hf_adapter(model, peft)
        return list(model)

    def adapter_plan(self, model: Model) -> Plan:
        """The conversion plan of a model's adapters, with PEFT's names. Collective. Raises ConfigError where it has none."""
        peft = self._peft_of(model)
        return make_plan(adapted(self.family, peft), self.native, collect_parameters(model, adapters=True))

    def _peft_of(self, model: Model) -> LoRA:
        own = [adapter.lora for adapter in adapters(model)][:1]
        everyones = [lora for rank in collectives.all_gather(own) for lora in rank]
        if not everyones:
            raise ConfigError("the model has no adapters; give it some with add_adapters, or to_megatron_model(peft=...).")
        return everyones[0]

    def load_hf_adapter(self, model: Model, path: str | Path, *, verify: bool = True, allow_nonfinite: bool = False,
                        show_progress: bool = True) -> Report:  # fmt: skip
        """Fills a model's adapters from the PEFT folder `path`, and compares every copy bit for bit. Collective.

        A model without adapters, not yet wrapped for data parallelism, is given those of the folder first. Safetensors only.
        Raises CheckpointError for a damaged folder, ConfigError for settings that differ from the model's or can't be,
        MappingError for tensors that don't fit.
        """
        with collectives.raise_together("opening the adapter"):
            folder = regular_files.place(path)
            found, infos = peft_folder.read_config(folder), peft_folder.find_weights(folder)
            modules = peft_folder.modules_of(infos)
            self.note_source(folder)
            rules = AdapterMap(self.family, found)
            stacked = {name for name in modules if found.target_parameters and rules.is_wrapper(name)}
            peft_folder.check_rank(infos, found.r, stacked.__contains__)
        if not any(collectives.all_gather(bool(collect_parameters(model, adapters=True)))):
            linears = tuple(name for name in modules if name not in stacked)
            self.add_adapters(model, replace(found, target_modules=linears, exclude_modules=()))
        peft = self._peft_of(model)
        different = [
            f"{name}={theirs!r}, here {ours!r}"
            for name in ("r", "lora_alpha", "use_rslora", "use_dora")
            if (theirs := getattr(found, name)) != (ours := getattr(peft, name))
        ]
        if different:
            raise ConfigError(f"{folder} must have the settings of this model's adapters; it has {', '.join(different)}.")
        plan = self.adapter_plan(model)
        with bytes_bar("import", show=show_progress and collectives.rank() == 0) as progress:
            report = import_weights(plan, infos, verify=verify, allow_nonfinite=allow_nonfinite, progress=progress)
        casts = SourceRecord.of(infos, aliases=()).held_in({name: spec.dtype for name, spec in plan.tensors.items()}).casts
        self.tell("rounded, because the model's adapters can't hold what the files have", casts)
        return replace(report, rounded=casts)

    def save_hf_adapter(self, model: Model, path: str | Path, show_progress: bool = True, *,
                        base_model_name_or_path: str | None = None, weight_dtype: torch.dtype | str | None = None,
                        verify: bool = True, allow_nonfinite: bool = False, writer: str = "shared") -> Report:  # fmt: skip
        """Publishes a model's adapters as a folder that peft.PeftModel.from_pretrained loads. Collective.

        `base_model_name_or_path` is what the folder says the adapters are for, by default where this bridge's weights came from.
        The folder appears by one rename, after every tensor was read back and compared; the rest is save_hf_pretrained's.
        """
        plan = self.adapter_plan(model)
        targets, named = self._named(model, plan)
        base = base_model_name_or_path or self.location
        is_transposed = any(target.is_transposed for target in targets)

        def write(folder: Path) -> None:
            peft_folder.write_config(folder, named, base=base, revision=self.revision, is_transposed=is_transposed)

        with bytes_bar("export", show=show_progress and collectives.rank() == 0) as progress:
            return export_weights(
                plan,
                Path(path),
                write_assets=write,
                dtypes=dtype_named(weight_dtype),
                only=peft_folder.WEIGHTS,
                verify=verify,
                allow_nonfinite=allow_nonfinite,
                writer=writer,
                sources=self.sources,
                progress=progress,
            )

    def _named(self, model: Model, plan: Plan) -> tuple[list[AdapterTarget], LoRA]:
        """What the adapter plan's tensors adapt, and the model's settings with names that say so to PEFT. Collective."""
        rules, base = plan.family.weights, self.plan(model)
        assert isinstance(rules, AdapterMap)
        weights = {record.name.partition(ADAPTER)[0] + ".weight" for held in plan.records for record in held}
        targets = [target for weight in sorted(weights) if (target := rules.target(weight, plan.dims)) is not None]
        adapted = {target.parameter for target in targets} | set(peft_folder.modules_of(plan.tensors))
        linears = {name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")}
        natives = {record.name for held in base.records for record in held if record.name.endswith(".weight")}
        parameters = {name for native in natives if (name := rules.parameter(native, plan.dims)) is not None}
        return targets, peft_folder.explicit(
            self._peft_of(model), {name: name in adapted for name in linears}, {name: name in adapted for name in parameters}
        )

    def export_adapter_weights(self, model: Model, cpu: bool = True, show_progress: bool = True, *,
                               weight_dtype: torch.dtype | str | None = None,
                               bucket_bytes: int = BUCKET_BYTES) -> Generator[tuple[str, torch.Tensor]]:  # fmt: skip
        """(name, whole tensor) of every adapter tensor, named as in a PEFT folder. As export_hf_weights otherwise. Collective."""
        plan = self.adapter_plan(model)
        specs = export_specs(plan, dtype_named(weight_dtype), frozenset())
        return Stream(plan, specs, cpu=cpu, bucket_bytes=bucket_bytes).tensors(show_progress=show_progress)
