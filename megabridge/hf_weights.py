"""The weights of a Hugging Face model: from files into a live model, and from there into files or to other programs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch

from megabridge import agreement
from megabridge.checkpoint import assets, source
from megabridge.checkpoint.hf import Way
from megabridge.checkpoint.quantised import find_weights
from megabridge.checkpoint.record import SourceRecord
from megabridge.checkpoint.safetensors import TensorInfo
from megabridge.conversion import tasks
from megabridge.conversion.buckets import Entries
from megabridge.conversion.carried import with_carried
from megabridge.conversion.encoding import quantization_for
from megabridge.conversion.exporter import Dtypes, export_specs, export_weights
from megabridge.conversion.importer import import_weights
from megabridge.conversion.native import survey
from megabridge.conversion.plan import Plan, check_source, make_plan
from megabridge.conversion.report import Report
from megabridge.conversion.stream import BUCKET_BYTES, Stream
from megabridge.conversion.tasks import Box, ConversionTask
from megabridge.errors import ConfigError, MappingError, listed
from megabridge.hf_model import HFModel, dtype_named
from megabridge.loggers.bars import bytes_bar
from megabridge.peft.merge import with_merged

Model = Sequence[torch.nn.Module]
WeightDtype = torch.dtype | Literal["source"] | str | None


class HFWeights(HFModel):
    """What `AutoBridge` does with a live model's weights. `import_report` tells of the last import."""

    import_report: Report | None = None
    _plan: tuple[tuple[int, ...], Plan] | None = None

    def plan(self, model: Model) -> Plan:
        """The conversion plan of a model, made once and cached. Collective the first time."""
        lives = survey(model)
        key = tuple(id(live.parameter) for live in lives)
        known = self._plan is not None and self._plan[0] == key
        if not all(agreement.gather(known)):
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
                        verify: bool = True, show_progress: bool = True) -> Report:  # fmt: skip
        """Fills a model from `hf_path` or the bridge's own source, and compares every copy bit for bit. Collective.

        `hf_path` is another checkpoint of the same model, fetched at `revision` (by default the bridge's) with the bridge's token
        and trust. `allow_missing` and `allow_unexpected` are name patterns; everything else must match exactly (MappingError),
        unless `strict` is False: then parameters that no tensor feeds keep what they had. `allow_bin` takes torch's pickled files
        (tensors only) where there are no safetensors, `allow_nonfinite` takes NaN and infinity; `reader` and `dedupe` are the
        settings conversion.reader and conversion.dedupe. An optimizer made before keeps its own copies: make it afterwards, or
        call its `reload_model_params`.
        """
        infos = self._open(hf_path, revision, allow_bin=allow_bin)
        plan = self.plan(model)
        with bytes_bar("import", show=show_progress and agreement.rank() == 0) as progress:
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
        patterns = [*self.family.ignored, *allow_missing, *allow_unexpected]
        self.carried = {name: info for name, info in infos.items() if plan.is_carried(name)}
        differing = (infos.keys() - plan.aliases.keys()) ^ (plan.tensors.keys() | self.carried.keys())
        left_out = [name for name in differing if not any(fnmatchcase(name, pattern) for pattern in patterns)]
        self.record = SourceRecord.of(infos, aliases=plan.aliases.keys() & infos.keys(), left_out=sorted(left_out))
        self.import_report = report
        return report

    def _open(self, hf_path: str | Path | None, revision: str | None, *, allow_bin: bool) -> dict[str, TensorInfo]:
        location = self.location if hf_path is None else str(hf_path)
        if location is None:
            raise ConfigError("a bridge made from a config has no weights; give hf_path.")
        with agreement.together("opening the source"):
            allow_bin = allow_bin or self.allow_bin
            folder = source.resolve(
                location, revision=revision or self.revision, token=self.token, code=self.trust_remote_code, allow_bin=allow_bin
            )
            if hf_path is not None:
                self.check_same(assets.read_config(folder), f"hf_path={location!r}")
            return find_weights(folder, allow_bin=allow_bin)

    # ------------------------------------------------------------------ into files

    def save_hf_pretrained(self, model: Model, path: str | Path, show_progress: bool = True, *,
                           source_path: str | Path | None = None, strict: bool = True, weight_dtype: WeightDtype = None,
                           max_shard_size: str | int = "5GB", verify: bool = True, allow_nonfinite: bool = False,
                           writer: str = "shared", quantization: str | None = None,
                           merge_adapter_weights: bool = True) -> Report:  # fmt: skip
        """Publishes a complete Hugging Face folder: weights, config, generation config, tokenizer, chat template. Collective.

        `weight_dtype` is by default the parameters'; "source" gives each tensor the dtype it was imported from. Tensors of
        multi-token-prediction layers that the model was built without come back as they were imported. `source_path` is
        a folder or hub id whose config and tokenizer are written in place of the bridge's own. The folder appears by one rename,
        after every tensor was read back and compared. NaN and infinite values are refused unless `allow_nonfinite`. After an
        import with strict=False, `strict` refuses to publish a model that lacks what the source had (MappingError).
        `writer="gather"` has rank 0 write everything, for ranks that share no file system. `quantization="fp8_block"` writes the
        linears in layers as block-scaled FP8, with `weight_dtype` for the rest: as the source's config has it where that was such
        FP8, else in blocks of 128 x 128. The weights of an adapted model have their adapters added, unless
        `merge_adapter_weights` is False: then they are the frozen ones.
        """
        write = self.write_hf_assets
        if source_path is not None:
            with agreement.together("opening source_path"):
                other = HFModel.from_hf_pretrained(
                    source_path, token=self.token, trust_remote_code=self.trust_remote_code, ignore_keys=self.ignore_keys
                )
                self.check_same(other.config, f"source_path={str(source_path)!r}")
            write = other.write_hf_assets
        options = {"max_shard_size": max_shard_size, "verify": verify, "allow_nonfinite": allow_nonfinite, "writer": writer}
        plan = self.outgoing(model, merge=merge_adapter_weights)
        return self._export(plan, Path(path), write, strict, weight_dtype, quantization, show_progress, options)

    def save_hf_weights(self, model: Model, path: str | Path, show_progress: bool = True, *,
                        strict: bool = True, weight_dtype: WeightDtype = None, max_shard_size: str | int = "5GB",
                        verify: bool = True, allow_nonfinite: bool = False, writer: str = "shared",
                        quantization: str | None = None, merge_adapter_weights: bool = True) -> Report:  # fmt: skip
        """The same with weights only. Collective."""
        options = {"max_shard_size": max_shard_size, "verify": verify, "allow_nonfinite": allow_nonfinite, "writer": writer}
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
        plan = with_carried(plan, self.carried, path.absolute().parent)
        aliases = self._aliases(plan)
        dtypes = self._dtypes(plan, weight_dtype)
        used = {spec.dtype for spec in export_specs(plan, dtypes, aliases).values()}
        # A config.json may state another dtype than its files have: "source" gives it back as it was.
        name = str(used.pop()).removeprefix("torch.") if len(used) == 1 and weight_dtype != "source" else None
        with agreement.together("choosing what to quantise"):
            quantized, said = quantization_for(plan, quantization, self.config)
        with bytes_bar("export", show=show_progress and agreement.rank() == 0) as progress:
            return export_weights(
                plan,
                path,
                write_assets=lambda folder: write(folder, name, said),
                quantization=quantized,
                dtypes=dtypes,
                aliases=aliases,
                progress=progress,
                **options,
            )

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
        """(name, whole tensor) of every Hugging Face tensor, names and order as in an export; each owns its storage.

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
        """A task for every Hugging Face tensor, in an export's order. Collective.

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
        with agreement.together("starting the stream"):
            dtypes = self._dtypes(plan, weight_dtype)
            specs = export_specs(plan, dtypes, self._aliases(plan)) if chosen is None else tasks.task_specs(plan, chosen, dtypes)
        return Stream(plan, specs, cpu=cpu, bucket_bytes=bucket_bytes, consumers=consumers)
