"""The weights of a Hugging Face model: from files into a live model, and from there into files or to other programs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from megabridge.bridge.source import HFModel, dtype_named
from megabridge.conversion import tasks
from megabridge.conversion.buckets import Entries
from megabridge.conversion.encoding import quantization_for
from megabridge.conversion.exporter import Dtypes, export_specs, export_weights
from megabridge.conversion.importer import import_weights
from megabridge.conversion.parameters import collect_parameters
from megabridge.conversion.passthrough import Passthrough, with_passthrough
from megabridge.conversion.plan import Plan, TensorSpec, check_source, make_plan
from megabridge.conversion.report import Report
from megabridge.conversion.source_dtypes import keep_source_dtypes
from megabridge.conversion.stream import BUCKET_BYTES, Stream
from megabridge.conversion.tasks import Box, ConversionTask
from megabridge.errors import ConfigError, MappingError, listed
from megabridge.hf import assets, resolve
from megabridge.hf.dtypes import Casts, counted, described
from megabridge.hf.dtypes import name as name_of
from megabridge.hf.quantised_weights import find_weights
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import Way, stored_as
from megabridge.loggers.bars import bytes_bar
from megabridge.native import digests
from megabridge.native.source_record import SourceRecord
from megabridge.parallel import collectives
from megabridge.peft.merge import with_merged

Model = Sequence[torch.nn.Module]
WeightDtype = torch.dtype | Literal["source"] | str | None


class HFWeights(HFModel):
    """What `AutoBridge` does with a live model's weights. `import_report` and `import_digest` tell of the last import."""

    import_report: Report | None = None
    import_digest: str = ""
    _told: str = ""
    _plan: tuple[tuple[int, ...], Plan] | None = None

    def plan(self, model: Model) -> Plan:
        """The conversion plan of a model, made once and cached. Collective the first time."""
        lives = collect_parameters(model)
        key = tuple(id(live.parameter) for live in lives)
        known = self._plan is not None and self._plan[0] == key
        if not all(collectives.all_gather(known)):
            self._plan = (key, make_plan(self.family, self.native, lives))
        assert self._plan is not None
        return self._plan[1]

    def outgoing(self, model: Model, *, merge: bool) -> Plan:
        """The plan of what leaves the model: with `merge`, its weights with their adapters added. Collective."""
        plan = self.plan(model)
        return with_merged(plan, model) if merge else plan

    # ------------------------------------------------------------------ from files

    def load_hf_weights(self, model: Model, hf_path: str | Path | None = None, *, revision: str | None = None,
                        strict: bool = True, allow_missing: Sequence[str] = (), allow_unexpected: Sequence[str] = (),
                        allow_bin: bool = False, allow_nonfinite: bool = False, reader: Way = "auto", dedupe: bool = False,
                        verify: bool = True, show_progress: bool = True, digest: bool = False) -> Report:  # fmt: skip
        """Fills a model from `hf_path` or the bridge's own source, and compares every copy bit for bit. Collective.

        What the parameters' dtypes can't hold is rounded, printed and in the report; `keep_dtypes` before has nothing rounded.
        `hf_path` is another checkpoint of the same model, fetched at `revision` (by default the bridge's) with the bridge's token
        and trust. `allow_missing` and `allow_unexpected` are name patterns; everything else must match exactly (MappingError),
        unless `strict` is False: then parameters that no tensor feeds keep what they had. `allow_bin` takes torch's pickled files
        (tensors only) where there are no safetensors, `allow_nonfinite` takes NaN and infinity; `reader` and `dedupe` are the
        settings conversion.reader and conversion.dedupe. `digest`: whether the ranks together read the files' tensors once more,
        for `import_digest`. An optimizer made before keeps its own copies: make it afterwards, or call its `reload_model_params`.
        """
        infos = self._open(hf_path, revision, allow_bin=allow_bin)
        plan = self.plan(model)
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
        self.import_digest = digests.of_tensors(one for info in infos.values() for one in stored_as(info)) if digest else ""
        names = [name for name in (*plan.tensors, *plan.aliases) if name in infos]
        patterns = [*self.family.ignored, *allow_missing, *allow_unexpected]
        with collectives.raise_together("opening what exports have again"):
            self.carry(Passthrough.of({name: info for name, info in infos.items() if plan.is_carried(name)}))
        differing = (infos.keys() - plan.aliases.keys()) ^ (plan.tensors.keys() | self.carried.infos.keys())
        left_out = [name for name in differing if not any(fnmatchcase(name, pattern) for pattern in patterns)]
        record = SourceRecord.of(infos, aliases=plan.aliases.keys() & infos.keys(), left_out=sorted(left_out))
        held = _held(plan, names)
        self.record = record.held_in(held)
        self.import_report = replace(
            report, rounded=self.record.casts, dtypes=counted([infos[name].dtype for name in plan.tensors if name in infos])
        )
        self.tell("rounded, because the model's parameters can't hold what the files have", self.record.casts)
        return self.import_report

    def keep_dtypes(self, model: Model, hf_path: str | Path | None = None, *, revision: str | None = None,
                    allow_bin: bool = False) -> list[torch.nn.Module]:  # fmt: skip
        """Has the parameters of a model that is converted and never run hold each tensor as the files have it. Collective.

        Call it before `load_hf_weights`, with the same source; the parameters' elements are lost. A pre-wrap hook may call it, for
        a model that is provided with runs=False. Returns the model's chunks.
        """
        infos = self._open(hf_path, revision, allow_bin=allow_bin)
        if any(collectives.all_gather(keep_source_dtypes(self.plan(model), infos))):
            self._plan = None
        return list(model)

    def note_rounding(self, model: Model, casts: Casts) -> None:
        """Has exports know of what a load of a native checkpoint rounded, if anything. Collective."""
        if casts and self.record is not None:
            plan = self.plan(model)
            self.record = self.record.held_in(_held(plan, [*plan.tensors, *self._aliases(plan)]))

    def tell(self, what: str, casts: Casts) -> None:
        """Prints what was rounded, once."""
        line = f"{what}: {described(casts)}"
        if casts and line != self._told and collectives.rank() == 0:
            print(line, file=sys.stderr, flush=True)
        self._told = line if casts else self._told

    def _open(self, hf_path: str | Path | None, revision: str | None, *, allow_bin: bool) -> dict[str, TensorInfo]:
        if self.location is None and hf_path is None:
            raise ConfigError("a bridge made from a config has no weights; give hf_path.")
        with collectives.raise_together("opening the source"):
            allow_bin = allow_bin or self.allow_bin
            if hf_path is None and revision in (None, self.revision):
                folder = self.source_folder(allow_bin=allow_bin)
                self.note_source(folder)
                return find_weights(folder, allow_bin=allow_bin)
            what = f"revision={revision!r}" if hf_path is None else f"hf_path={str(hf_path)!r}"
            folder = resolve.resolve(
                str(self.location if hf_path is None else hf_path),
                revision=revision or self.revision, token=self.token, code=self.trust_remote_code, allow_bin=allow_bin,
            )  # fmt: skip
            self.check_same(assets.read_config(folder), what)
            self.note_source(folder)
            return find_weights(folder, allow_bin=allow_bin)

    # ------------------------------------------------------------------ into files

    def save_hf_pretrained(self, model: Model, path: str | Path, show_progress: bool = True, *,
                           source_path: str | Path | None = None, strict: bool = True, weight_dtype: WeightDtype = None,
                           max_shard_size: str | int | None = None, verify: bool = True, allow_nonfinite: bool = False,
                           writer: str = "shared", quantization: str | None = None,
                           merge_adapter_weights: bool = True) -> Report:  # fmt: skip
        """Publishes a complete Hugging Face folder: weights, config, generation config, tokenizer, chat template. Collective.

        `weight_dtype` is by default the parameters'; "source" gives each tensor the dtype it was imported from. Tensors of
        multi-token-prediction layers that the model was built without come back as they were imported. `source_path` is
        a folder or hub id whose config and tokenizer are written in place of the bridge's own. `max_shard_size` is of one file; by
        default the files are the source's where all tensors have its names and dtypes, else of at most 5GB. The folder appears by
        one rename, after every tensor was read back and compared; an earlier export is replaced, if nobody changed it and the
        model wasn't read from it. What can't be as the source had it, because a parameter that held it since has less precision,
        is printed once and in the report. NaN and infinite values are refused unless `allow_nonfinite`. After an import with
        strict=False, `strict` refuses to publish a model that lacks what the source had. `writer="gather"` has rank 0 write
        everything, for ranks that share no file system. `quantization="fp8_block"` writes the linears in layers as block-scaled
        FP8, with `weight_dtype` for the rest: as the source's config has it where that was such FP8, else in blocks of 128 x 128.
        The weights of an adapted model have their adapters added, unless
        `merge_adapter_weights` is False: then they are the frozen ones.
        """
        write, sources = self.write_hf_assets, self.sources
        if source_path is not None:
            with collectives.raise_together("opening source_path"):
                other = HFModel.from_hf_pretrained(
                    source_path, token=self.token, trust_remote_code=self.trust_remote_code, ignore_keys=self.ignore_keys
                )
                self.check_same(other.config, f"source_path={str(source_path)!r}")
            write, sources = other.write_hf_assets, [*sources, *other.sources]
        options: dict[str, Any] = {
            "max_shard_size": max_shard_size,
            "verify": verify,
            "allow_nonfinite": allow_nonfinite,
            "writer": writer,
            "sources": sources,
        }
        plan = self.outgoing(model, merge=merge_adapter_weights)
        return self._export(plan, Path(path), write, strict, weight_dtype, quantization, show_progress, options)

    def save_hf_weights(self, model: Model, path: str | Path, show_progress: bool = True, *,
                        strict: bool = True, weight_dtype: WeightDtype = None, max_shard_size: str | int | None = None,
                        verify: bool = True, allow_nonfinite: bool = False, writer: str = "shared",
                        quantization: str | None = None, merge_adapter_weights: bool = True) -> Report:  # fmt: skip
        """The same with weights only. Collective."""
        options: dict[str, Any] = {
            "max_shard_size": max_shard_size,
            "verify": verify,
            "allow_nonfinite": allow_nonfinite,
            "writer": writer,
            "sources": self.sources,
        }
        plan = self.outgoing(model, merge=merge_adapter_weights)
        return self._export(plan, Path(path), lambda *_: None, strict, weight_dtype, quantization, show_progress, options)

    def _export(self, plan: Plan, path: Path, write: Callable[[Path, str | None, dict[str, Any] | None], None], strict: bool,
                weight_dtype: WeightDtype, quantization: str | None, show_progress: bool,
                options: dict[str, Any]) -> Report:  # fmt: skip
        if strict and self.record is not None and self.record.left_out:
            raise MappingError(
                "the import was not strict, so the export would differ from its source; pass strict=False to publish it all the "
                "same:\n  " + listed(list(self.record.left_out))
            )
        plan = with_passthrough(plan, self.carried, path.absolute().parent)
        aliases = self._aliases(plan)
        dtypes = self._dtypes(plan, weight_dtype)
        specs = export_specs(plan, dtypes, aliases)
        casts = self._casts(plan, specs)
        self.tell("exported with less precision than the source had", casts)
        # A config.json may state another dtype than its files have: "source" gives it back as it was.
        name = None if weight_dtype == "source" else _most(specs)
        with collectives.raise_together("choosing what to quantise"):
            quantized, said = quantization_for(plan, quantization, self.config)
        with bytes_bar("export", show=show_progress and collectives.rank() == 0) as progress:
            report = export_weights(
                plan,
                path,
                write_assets=lambda folder: write(folder, name, said),
                quantization=quantized,
                dtypes=dtypes,
                aliases=aliases,
                files=self._files(specs) if quantized is None and options["max_shard_size"] is None else None,
                progress=progress,
                **options,
            )
        return replace(report, rounded=casts)

    def _casts(self, plan: Plan, specs: Mapping[str, TensorSpec]) -> Casts:
        """The tensors of an export that aren't the source's, because a parameter or the export can't hold that."""
        if self.record is None:
            return {}
        written = {name: spec.dtype for name, spec in specs.items()}
        found = self.record.held_in(_held(plan, list(specs))).held_in(written).casts
        return {name: pair for name, pair in found.items() if name in specs}

    def _files(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, Sequence[str]] | None:
        """The source's files, where an export of `specs` can have them."""
        return None if self.record is None else self.record.files_of({name: spec.dtype for name, spec in specs.items()})

    def _aliases(self, plan: Plan) -> frozenset[str]:
        """The tied copies that an export has: those that the source carried."""
        return frozenset() if self.record is None else self.record.aliases & plan.aliases.keys()

    def _dtypes(self, plan: Plan, weight_dtype: WeightDtype) -> Dtypes:
        """What `weight_dtype` asks for: one dtype, one by name, or None for the parameters'."""
        if weight_dtype != "source":
            return dtype_named(weight_dtype)
        if self.record is None:
            raise ConfigError("weight_dtype='source' needs an import by this bridge before; load weights or name a dtype.")
        return self.record.dtypes([*plan.tensors, *self._aliases(plan)])

    # ------------------------------------------------------------------ to other programs, without files

    def export_hf_weights(self, model: Model, cpu: bool = False, show_progress: bool = True,
                          conversion_tasks: Sequence[ConversionTask] | None = None, merge_adapter_weights: bool = True, *,
                          weight_dtype: WeightDtype = None, bucket_bytes: int = BUCKET_BYTES,
                          consumers: Collection[int] | None = None) -> Generator[tuple[str, torch.Tensor]]:  # fmt: skip
        """(name, whole tensor) of every Hugging Face tensor, in natural order; each owns its storage.

        Collective: every rank calls it and uses the iterator up, or closes it; only ranks in `consumers` (None: all) get
        tensors, the others' iterators are empty. `cpu` brings them to the host. `conversion_tasks`, from `get_conversion_tasks`,
        says which tensors, in which order. Adapters are added unless `merge_adapter_weights` is False. Memory beside the model: two
        buckets of `bucket_bytes` and one tensor. Raises the same MegabridgeError on every rank; also where another rank closed the
        iterator before the end. Hold it in `contextlib.closing` where an exception may keep it alive.
        """
        plan = self.outgoing(model, merge=merge_adapter_weights)
        stream = self._stream(plan, conversion_tasks, weight_dtype, cpu=cpu, bucket_bytes=bucket_bytes, consumers=consumers)
        return stream.tensors(show_progress=show_progress)

    def export_hf_buckets(self, model: Model, *, cpu: bool = False, conversion_tasks: Sequence[ConversionTask] | None = None,
                          merge_adapter_weights: bool = True, weight_dtype: WeightDtype = None, bucket_bytes: int = BUCKET_BYTES,
                          consumers: Collection[int] | None = None) -> Generator[tuple[torch.Tensor, Entries]]:  # fmt: skip
        """(flat bytes, entries) of the same tensors, valid until the next step; `entry.view(flat)` is a tensor. Collective."""
        plan = self.outgoing(model, merge=merge_adapter_weights)
        return self._stream(plan, conversion_tasks, weight_dtype, cpu=cpu, bucket_bytes=bucket_bytes, consumers=consumers).flat()

    def export_hf_shards(self, model: Model, *, replicas: bool = False) -> Iterator[tuple[str, Box, torch.Tensor]]:
        """(name, box, view of a parameter) of what this rank gives to an export, or holds with `replicas`. Nothing is exchanged.

        Over all ranks the boxes tile every tensor once; `box.view(whole).copy_(local)` puts a part in its place. Adapters are left
        out.
        """
        return tasks.shards(self.family, self.native, model, replicas=replicas)

    def get_conversion_tasks(self, model: Model, hf_path: str | Path | None = None) -> list[ConversionTask]:
        """A task for every Hugging Face tensor, in natural order. Collective.

        `hf_path` gives them the dtypes of that checkpoint, and the tied copies that it carries.
        """
        plan, dtypes = self.plan(model), None
        aliases = self._aliases(plan)
        if hf_path is not None:
            infos = self._open(hf_path, None, allow_bin=False)
            check_source(plan, infos)
            aliases = frozenset(plan.aliases.keys() & infos.keys())
            dtypes = {name: info.dtype for name, info in infos.items()}
        return tasks.make_tasks(plan, model, export_specs(plan, dtypes, aliases))

    def _stream(self, plan: Plan, chosen: Sequence[ConversionTask] | None, weight_dtype: WeightDtype, *, cpu: bool,
                bucket_bytes: int, consumers: Collection[int] | None) -> Stream:  # fmt: skip
        with collectives.raise_together("starting the stream"):
            dtypes = self._dtypes(plan, weight_dtype)
            specs = export_specs(plan, dtypes, self._aliases(plan)) if chosen is None else tasks.task_specs(plan, chosen, dtypes)
        self.tell("exported with less precision than the source had", self._casts(plan, specs))
        return Stream(plan, specs, cpu=cpu, bucket_bytes=bucket_bytes, consumers=consumers)


def _held(plan: Plan, names: Sequence[str]) -> dict[str, torch.dtype]:
    """The dtypes of the parameters that hold tensors."""
    return {name: plan.tensors[plan.aliases.get(name, name)].dtype for name in names}


def _most(specs: Mapping[str, TensorSpec]) -> str:
    """The dtype that most elements of an export have, as config.json spells it."""
    elements: Counter[torch.dtype] = Counter()
    for spec in specs.values():
        elements[spec.dtype] += prod(spec.shape)
    return name_of(elements.most_common(1)[0][0])
