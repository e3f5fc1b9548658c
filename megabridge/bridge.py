"""AutoBridge: one object that knows a Hugging Face model and moves it into Megatron-Core and back.

Names and signatures are Megatron Bridge's; further keywords are keyword-only. Models are lists of chunks. Methods that take a
model are collective: every rank calls them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from megabridge import agreement
from megabridge.checkpoint import assets, source
from megabridge.checkpoint.hf import Way, find_tensors
from megabridge.checkpoint.safetensors import TensorInfo
from megabridge.conversion import tasks
from megabridge.conversion.buckets import Entries
from megabridge.conversion.exporter import Dtypes, export_specs, export_weights
from megabridge.conversion.importer import import_weights
from megabridge.conversion.native import survey
from megabridge.conversion.plan import Plan, check_source, make_plan
from megabridge.conversion.report import Report
from megabridge.conversion.stream import BUCKET_BYTES, Stream
from megabridge.conversion.tasks import Box, ConversionTask
from megabridge.errors import ConfigError
from megabridge.families import all_families, family_for
from megabridge.families.registry import architecture_of
from megabridge.loggers.bars import bytes_bar
from megabridge.provider import ModelProvider

Model = Sequence[torch.nn.Module]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AutoBridge:
    """Made by `from_hf_pretrained` or `from_hf_config`.

    `config` is the content of config.json as published; `folder` holds it, with tokenizer and templates, or is None for a bridge
    made from a config object; `import_report` tells of the last import.
    """

    def __init__(self, config: dict[str, Any], *, folder: Path | None, location: str | None = None, revision: str | None = None,
                 dtype: torch.dtype | None = None, aliases: frozenset[str] = frozenset(),
                 allow_bin: bool = False) -> None:  # fmt: skip
        self.config = config
        self.folder = folder
        self.location = location
        self.revision = revision
        self.family = family_for(config)
        self.native = self.family.native(config)
        self.dtype = dtype or _dtype_of(config)
        self.aliases = aliases
        self.allow_bin = allow_bin
        self.source_dtypes: dict[str, torch.dtype] = {}
        self.import_report: Report | None = None
        self._plan: tuple[tuple[int, ...], Plan] | None = None

    # ------------------------------------------------------------------ making one

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, *, revision: str | None = None, dtype: torch.dtype | str | None = None,
                           trust_remote_code: bool = False, allow_bin: bool = False) -> AutoBridge:  # fmt: skip
        """A bridge to a local folder or a hub model. Only config and tokenizer are fetched now; no code of the model ever runs.

        `dtype` is the parameters' ("bfloat16" or torch.bfloat16), by default config.json's; `allow_bin` lets a local folder's
        weights be torch's pickled files where it has no others. Raises CheckpointError for what
        can't be reached or read, ConfigError for an architecture or a setting that isn't supported.
        """
        if trust_remote_code:
            raise ConfigError(
                "trust_remote_code=True is not supported: families convert by name, no model code is run; leave it out."
            )
        folder = source.resolve(str(path), revision=revision, config_only=True)
        return cls(
            assets.read_config(folder),
            folder=folder,
            location=str(path),
            revision=revision,
            dtype=_dtype(dtype),
            allow_bin=allow_bin,
        )

    @classmethod
    def from_hf_config(cls, config: Any, *, dtype: torch.dtype | str | None = None) -> AutoBridge:
        """A bridge from a transformers config object or a dict of its content. It has no weights and no tokenizer."""
        content = dict(config) if isinstance(config, dict) else json.loads(config.to_json_string(use_diff=False))
        content["architectures"] = content.get("architectures") or [architecture_of(content)]
        return cls(content, folder=None, dtype=_dtype(dtype))

    @staticmethod
    def list_supported_models() -> list[str]:
        """Hugging Face class names that convert."""
        return sorted(all_families())

    @staticmethod
    def supports(config: Any) -> bool:
        """Whether a config (object or dict) converts: its architecture is known and every setting can be represented."""
        content = dict(config) if isinstance(config, dict) else json.loads(config.to_json_string(use_diff=False))
        try:
            family_for(content).native(content)
        except ConfigError:
            return False
        return True

    @classmethod
    def can_handle(cls, path: str | Path, trust_remote_code: bool = False) -> bool:
        """Whether the model at `path` converts. Raises CheckpointError when it can't be reached or is broken."""
        del trust_remote_code  # a model that needs its own code is unsupported either way
        return cls.supports(assets.read_config(source.resolve(str(path), config_only=True)))

    # ------------------------------------------------------------------ into Megatron

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | Path | None = None) -> ModelProvider:
        """A provider of this model. With `load_weights`, providing it also fills it from `hf_path` or the bridge's own source."""
        provider = ModelProvider(self.native, family_name=self.family.architecture)
        if self.dtype is not None:
            provider.params_dtype = self.dtype
        if load_weights:
            if hf_path is None and self.location is None:
                raise ConfigError(
                    "a bridge made from a config has no weights; call to_megatron_provider(load_weights=False) or give hf_path."
                )

            def load(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
                self.load_hf_weights(chunks, hf_path)
                return chunks

            provider.perform_initialization = False  # every element is filled by the import
            provider.register_pre_wrap_hook(load)
        return provider

    def to_megatron_model(
        self, load_weights: bool = True, hf_path: str | Path | None = None, **settings: Any
    ) -> list[torch.nn.Module]:
        """The model itself, without data-parallel wrapping. `settings` are the provider's, such as tensor_model_parallel_size=2."""
        provider = self.to_megatron_provider(load_weights, hf_path)
        wrap_with_ddp = settings.pop("wrap_with_ddp", False)
        for name, value in settings.items():
            setattr(provider, name, value)
        provider.finalize()
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)

    def plan(self, model: Model) -> Plan:
        """The conversion plan of a model, made once and cached. Collective the first time."""
        lives = survey(model)
        key = tuple(id(live.parameter) for live in lives)
        known = self._plan is not None and self._plan[0] == key
        if not all(agreement.gather(known)):
            self._plan = (key, make_plan(self.family, self.native, lives))
        assert self._plan is not None
        return self._plan[1]

    def load_hf_weights(self, model: Model, hf_path: str | Path | None = None, *, show_progress: bool = True, verify: bool = True,
                        allow_missing: Sequence[str] = (), allow_unexpected: Sequence[str] = (), allow_bin: bool = False,
                        allow_nonfinite: bool = False, reader: Way = "auto", dedupe: bool = False) -> Report:  # fmt: skip
        """Fills a model from `hf_path` or the bridge's own source, and compares every copy bit for bit. Collective.

        `allow_missing` and `allow_unexpected` are name patterns; everything else must match exactly (MappingError). An optimizer
        made before keeps its own copies: make it afterwards, or call its `reload_model_params`. `allow_bin` takes torch's pickled
        files (tensors only) where there are no safetensors, `allow_nonfinite` takes NaN and infinity; `reader` and `dedupe` are the
        settings conversion.reader and conversion.dedupe.
        """
        infos = self._open(hf_path, allow_bin=allow_bin or self.allow_bin)
        plan = self.plan(model)
        with bytes_bar("import", show=show_progress and agreement.rank() == 0) as progress:
            report = import_weights(
                plan, infos, allow_missing=allow_missing, allow_unexpected=allow_unexpected, allow_nonfinite=allow_nonfinite,
                verify=verify, way=reader, dedupe=dedupe, progress=progress,
            )  # fmt: skip
        self.aliases = frozenset(plan.aliases.keys() & infos.keys())
        self.source_dtypes = {name: info.dtype for name, info in infos.items()}
        self.import_report = report
        return report

    def _open(self, hf_path: str | Path | None, *, allow_bin: bool) -> dict[str, TensorInfo]:
        location = self.location if hf_path is None else str(hf_path)
        if location is None:
            raise ConfigError("a bridge made from a config has no weights; give hf_path.")
        with agreement.together("opening the source"):
            folder = source.resolve(location, revision=self.revision)
            if hf_path is not None:
                other = architecture_of(assets.read_config(folder))
                if other != self.family.architecture:
                    raise ConfigError(
                        f"hf_path={location!r} is a {other}, this bridge converts {self.family.architecture}; give one of those."
                    )
            return find_tensors(folder, allow_bin=allow_bin)

    # ------------------------------------------------------------------ back to Hugging Face

    def save_hf_pretrained(self, model: Model, path: str | Path, show_progress: bool = True, *,
                           weight_dtype: torch.dtype | Literal["source"] | str | None = None,
                           max_shard_size: str | int = "5GB", verify: bool = True, allow_nonfinite: bool = False,
                           writer: str = "shared") -> Report:  # fmt: skip
        """Publishes a complete Hugging Face folder: weights, config, generation config, tokenizer, chat template. Collective.

        `weight_dtype` is by default the parameters'; "source" gives each tensor the dtype it was imported from. The folder appears
        by one rename, after every tensor was read back and compared. NaN and infinite values are refused unless `allow_nonfinite`.
        `writer="gather"` has rank 0 write everything, for ranks that share no file system.
        """
        options = {"max_shard_size": max_shard_size, "verify": verify, "allow_nonfinite": allow_nonfinite, "writer": writer}
        return self._export(model, Path(path), self.write_assets, weight_dtype, show_progress, options)

    def save_hf_weights(self, model: Model, path: str | Path, show_progress: bool = True, *,
                        weight_dtype: torch.dtype | Literal["source"] | str | None = None,
                        max_shard_size: str | int = "5GB", verify: bool = True, allow_nonfinite: bool = False,
                        writer: str = "shared") -> Report:  # fmt: skip
        """The same with weights only. Collective."""
        options = {"max_shard_size": max_shard_size, "verify": verify, "allow_nonfinite": allow_nonfinite, "writer": writer}
        return self._export(model, Path(path), lambda folder, dtype: None, weight_dtype, show_progress, options)

    def _export(self, model: Model, path: Path, write: Callable[[Path, str | None], None], weight_dtype: torch.dtype | str | None,
                show_progress: bool, options: dict[str, Any]) -> Report:  # fmt: skip
        plan = self.plan(model)
        dtypes, name = self._dtypes(weight_dtype), None
        if weight_dtype != "source":
            used = {spec.dtype for spec in plan.tensors.values()} if weight_dtype is None else {_dtype(weight_dtype)}
            name = str(used.pop()).removeprefix("torch.") if len(used) == 1 else None
        with bytes_bar("export", show=show_progress and agreement.rank() == 0) as progress:
            return export_weights(
                plan,
                path,
                write_assets=lambda folder: write(folder, name),
                dtypes=dtypes,
                aliases=self.aliases & plan.aliases.keys(),
                progress=progress,
                **options,
            )

    def _dtypes(self, weight_dtype: torch.dtype | str | None) -> Dtypes:
        """What `weight_dtype` asks for: one dtype, one by name, or None for the parameters'."""
        if weight_dtype != "source":
            return _dtype(weight_dtype)
        if not self.source_dtypes:
            raise ConfigError("weight_dtype='source' needs an import by this bridge before; load weights or name a dtype.")
        return self.source_dtypes

    def write_assets(self, folder: Path, dtype: str | None = None) -> None:
        """Writes config, generation config, tokenizer and chat template into `folder`, as they came. One rank calls it.

        `dtype` is what config.json is to say of the weights; None leaves it.
        """
        assets.write_config(folder, self.config, source=self.folder, dtype=dtype)
        if self.folder is not None:
            assets.copy_assets(self.folder, folder)

    # ------------------------------------------------------------------ to other programs, without files

    def export_hf_weights(self, model: Model, cpu: bool = False, show_progress: bool = True,
                          conversion_tasks: Sequence[ConversionTask] | None = None, *,
                          weight_dtype: torch.dtype | Literal["source"] | str | None = None, bucket_bytes: int = BUCKET_BYTES,
                          consumers: Collection[int] | None = None) -> Generator[tuple[str, torch.Tensor]]:  # fmt: skip
        """(name, whole tensor) of every Hugging Face tensor, names and order as in an export; each owns its storage.

        Collective: every rank calls it and uses the iterator up, or closes it; only ranks in `consumers` (None: all) get
        tensors, the others' iterators are empty. `cpu` brings them to the host. `conversion_tasks`, from `get_conversion_tasks`,
        says which tensors, in which order. Memory beside the model: two buckets of `bucket_bytes` and one tensor. Raises the same
        MegabridgeError on every rank; also where another rank closed the iterator before the end. Hold it in
        `contextlib.closing` where an exception may keep it alive.
        """
        stream = self._stream(model, conversion_tasks, weight_dtype, cpu=cpu, bucket_bytes=bucket_bytes, consumers=consumers)
        return stream.tensors(show_progress=show_progress)

    def export_hf_buckets(self, model: Model, *, cpu: bool = False, conversion_tasks: Sequence[ConversionTask] | None = None,
                          weight_dtype: torch.dtype | Literal["source"] | str | None = None, bucket_bytes: int = BUCKET_BYTES,
                          consumers: Collection[int] | None = None) -> Generator[tuple[torch.Tensor, Entries]]:  # fmt: skip
        """(flat bytes, entries) of the same tensors, valid until the next step; `entry.view(flat)` is a tensor. Collective."""
        return self._stream(model, conversion_tasks, weight_dtype, cpu=cpu, bucket_bytes=bucket_bytes, consumers=consumers).flat()

    def export_hf_shards(self, model: Model, *, replicas: bool = False) -> Iterator[tuple[str, Box, torch.Tensor]]:
        """(name, box, view of a parameter) of what this rank gives to an export, or holds with `replicas`. Nothing is exchanged.

        Over all ranks the boxes tile every tensor once; `box.view(whole).copy_(local)` puts a part in its place.
        """
        return tasks.shards(self.family, self.native, model, replicas=replicas)

    def get_conversion_tasks(self, model: Model, hf_path: str | Path | None = None) -> list[ConversionTask]:
        """A task for every Hugging Face tensor, in an export's order. Collective.

        `hf_path` gives them the dtypes of that checkpoint, and the tied copies that it carries.
        """
        plan, dtypes = self.plan(model), None
        aliases = self.aliases & plan.aliases.keys()
        if hf_path is not None:
            infos = self._open(hf_path, allow_bin=self.allow_bin)
            check_source(plan, infos)
            aliases = frozenset(plan.aliases.keys() & infos.keys())
            dtypes = {name: info.dtype for name, info in infos.items()}
        return tasks.make_tasks(plan, model, export_specs(plan, dtypes, aliases))

    def _stream(self, model: Model, chosen: Sequence[ConversionTask] | None, weight_dtype: torch.dtype | str | None, *, cpu: bool,
                bucket_bytes: int, consumers: Collection[int] | None) -> Stream:  # fmt: skip
        plan = self.plan(model)
        with agreement.together("starting the stream"):
            dtypes = self._dtypes(weight_dtype)
            aliases = self.aliases & plan.aliases.keys()
            specs = export_specs(plan, dtypes, aliases) if chosen is None else tasks.task_specs(plan, chosen, dtypes)
        return Stream(plan, specs, cpu=cpu, bucket_bytes=bucket_bytes, consumers=consumers)

    # ------------------------------------------------------------------ what it knows

    @property
    def transformer_config(self) -> Any:
        """The TransformerConfig of this model on one rank."""
        provider = self.to_megatron_provider(load_weights=False)
        provider.finalize()
        return provider.config


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _dtype_of(config: dict[str, Any]) -> torch.dtype | None:
    for key in assets.DTYPE_KEYS:
        if config.get(key) is not None:
            return _dtype(str(config[key]).removeprefix("torch."))
    return None
