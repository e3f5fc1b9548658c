"""AutoBridge: converts one Hugging Face model to Megatron-Core and back.

Names and signatures are Megatron Bridge's; additional keywords are keyword-only. A model is a list of chunks. Unless they say
otherwise, methods that take a model are collective: every rank calls them. Each forwards to a function of a module in this package.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from megabridge.bridge import adapters, checkpoints, sessions, upload, weights
from megabridge.bridge import source as sources
from megabridge.bridge.adapters import Peft
from megabridge.bridge.source import ModelSource, dtype_named, one_dtype
from megabridge.bridge.state import BridgeState
from megabridge.bridge.weights import ExportOptions, Model, StreamOptions, WeightDtype
from megabridge.conversion.buckets import Entries
from megabridge.conversion.plan import Plan
from megabridge.conversion.report import Report
from megabridge.conversion.stream import BUCKET_BYTES
from megabridge.conversion.tasks import Box, ConversionTask
from megabridge.errors import ConfigError
from megabridge.families import all_families
from megabridge.hf import assets, resolve
from megabridge.hf.dtypes import Casts
from megabridge.hf.tensor_files import Way
from megabridge.models.provider import ModelProvider
from megabridge.native import checkpoint
from megabridge.parallel import collectives
from megabridge.peft import LoRA


class AutoBridge:
    """Converts a Hugging Face model to Megatron-Core and back.

    Create one with `from_hf_pretrained`. `to_megatron_model` builds the model under any layout, `save_hf_pretrained` writes it as a
    Hugging Face folder, `export_hf_weights` streams its tensors, `import_ckpt` and `export_ckpt` convert in one call. `source`
    describes the model, `state` records what has been imported; `import_report` is the report of the last import.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.state = BridgeState()

    def __repr__(self) -> str:
        return f"AutoBridge({self.source!r})"

    # ------------------------------------------------------------------ which model

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, *, revision: str | None = None, dtype: torch.dtype | str | None = None,
                           torch_dtype: torch.dtype | str | None = None, trust_remote_code: bool = False,
                           device_map: str | None = None, token: str | None = None, allow_bin: bool = False,
                           ignore_keys: Collection[str] = ()) -> Self:  # fmt: skip
        """Returns a bridge to a local folder or a hub model. Fetches config and tokenizer; loading the weights fetches them.

        `revision` is a branch, tag or commit of the hub repository; config, tokenizer and weights come from one commit. `dtype`
        (or `torch_dtype`) is the dtype of the parameters, by default that of config.json. `device_map` says where they live: "auto"
        (this rank's CUDA device, or the CPU where there is none), "cpu" or "cuda[:n]". The model's own code never runs, since
        families convert by name; its *.py files are fetched, kept with the tokenizer and written with every export only with
        `trust_remote_code`. `allow_bin` accepts torch's pickled weights (tensors only) where there are no safetensors.
        `ignore_keys` names keys of config.json that nothing reads and whose values would be refused; use it where the model
        computes the same without them. Raises CheckpointError for files that can't be reached or read, ConfigError for an
        architecture or a setting that isn't supported.
        """
        return cls(
            sources.from_pretrained(
                path,
                revision=revision,
                dtype=one_dtype(dtype, torch_dtype),
                trust_remote_code=trust_remote_code,
                device_map=device_map,
                token=token,
                allow_bin=allow_bin,
                ignore_keys=ignore_keys,
            )
        )

    @classmethod
    def from_hf_config(cls, config: Any, *, dtype: torch.dtype | str | None = None, ignore_keys: Collection[str] = ()) -> Self:
        """Returns a bridge for a transformers config object, or a dict of its content. It has no weights and no tokenizer."""
        return cls(sources.from_config(config, dtype=dtype_named(dtype), ignore_keys=ignore_keys))

    @classmethod
    def from_auto_config(cls, megatron_path: str | Path, hf_model_id: str | Path | None = None, trust_remote_code: bool = False, *,
                         revision: str | None = None, token: str | None = None,
                         ignore_keys: Collection[str] = ()) -> Self:  # fmt: skip
        """Returns a bridge to a native checkpoint, made from the config, tokenizer and chat template stored in it.

        With `hf_model_id` (a folder or hub id, at `revision`) they come from there instead; a checkpoint that megabridge didn't
        write needs it. `ignore_keys` is that of from_hf_pretrained. Raises CheckpointError where neither has a config, ConfigError
        where the two contradict each other.
        """
        folder = checkpoint.locate(Path(megatron_path))
        made = cls(
            sources.from_native(
                folder, hf_model_id, trust_remote_code=trust_remote_code, revision=revision, token=token, ignore_keys=ignore_keys
            )
        )
        made.state.remember(folder)
        return made

    @staticmethod
    def list_supported_models() -> list[str]:
        """Returns the Hugging Face class names of the supported architectures, sorted."""
        return sorted(all_families())

    @staticmethod
    def supports(config: Any, *, ignore_keys: Collection[str] = ()) -> bool:
        """Returns whether a config (object or dict) converts: its architecture and every setting are supported."""
        return sources.supports(config, ignore_keys=ignore_keys)

    @classmethod
    def can_handle(cls, path: str | Path, trust_remote_code: bool = False, *, ignore_keys: Collection[str] = ()) -> bool:
        """Returns whether the model at `path` converts; fetches only its config.json.

        `trust_remote_code` has no effect: a model that only its own code describes has no family. Raises CheckpointError when
        config.json can't be reached or is damaged.
        """
        del trust_remote_code
        content = assets.read_config(resolve.resolve(str(path), config_only=True, tokenizer=False))
        return cls.supports(content, ignore_keys=ignore_keys)

    @property
    def transformer_config(self) -> Any:
        """The TransformerConfig of this model on one rank."""
        provider = self.provider()
        provider.finalize()
        return provider.config

    @property
    def mla_transformer_config(self) -> Any:
        """The MLATransformerConfig of a model with multi-latent attention. Raises ConfigError for any other."""
        if not self.source.native.get("multi_latent_attention"):
            raise ConfigError(f"{self.source.family.architecture} has no multi-latent attention; use transformer_config.")
        return self.transformer_config

    @property
    def import_report(self) -> Report | None:
        """The report of the last import; None before the first."""
        return self.state.import_report

    @property
    def import_digest(self) -> str:
        """The digest of the files' tensors, where the last import had `digest=True`; otherwise empty."""
        return self.state.import_digest

    def weights_folder(self) -> Path:
        """Returns the folder of the source's weights, fetched if on a hub. Any rank may call it. Raises CheckpointError."""
        return sources.weights_folder(self.source)

    def provider(self) -> ModelProvider:
        """Returns a provider of this model that loads no weights; its settings can still be changed."""
        return sources.provider(self.source)

    def write_hf_assets(self, folder: Path) -> None:
        """Writes config, generation config, tokenizer and chat template of an export, as the source has them. One rank calls it."""
        sources.write_hf_assets(self.source, folder)

    def write_assets(self, folder: Path) -> None:
        """Writes what accompanies a native checkpoint: config, tokenizer, templates, the source's record. One rank calls it."""
        checkpoints.write_assets(self.source, self.state, folder)

    # ------------------------------------------------------------------ into Megatron

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | Path | None = None, *, revision: str | None = None,
                             peft: Peft | None = None) -> ModelProvider:  # fmt: skip
        """Returns a provider of this model. With `load_weights` its model is filled from `hf_path` or the bridge's own source.

        `peft` freezes the model and adds adapters: new ones with these settings, or those of a PEFT folder.
        """
        provider = self.provider()
        if not load_weights and hf_path is not None:
            raise ConfigError(f"hf_path={str(hf_path)!r} has no meaning with load_weights=False; leave one of them out.")
        if load_weights and hf_path is None and self.source.location is None:
            raise ConfigError(
                "a bridge made from a config has no weights; call to_megatron_provider(load_weights=False), give hf_path, or use "
                "load_megatron_model for a native checkpoint."
            )
        if load_weights:
            provider.perform_initialization = False  # every element is filled by the import
            provider.register_pre_wrap_hook(partial(weights.loaded, self.source, self.state, hf_path=hf_path, revision=revision))
        if peft is not None:
            provider.adapted = True
            provider.register_pre_wrap_hook(partial(adapters.adapt, self.source, self.state, peft=peft))
        return provider

    def to_megatron_model(self, load_weights: bool = True, hf_path: str | Path | None = None, *, revision: str | None = None,
                          wrap_with_ddp: bool = False, peft: Peft | None = None,
                          **settings: Any) -> list[torch.nn.Module]:  # fmt: skip
        """Builds the model and returns its chunks, wrapped for data parallelism with `wrap_with_ddp`. Collective.

        `settings` are attributes of the provider, such as tensor_model_parallel_size=2, or sizes by their short names (tp, pp, vpp,
        cp, ep, etp). Without any size the layout is that of the running process groups, or of a single process.
        """
        provider = self.to_megatron_provider(load_weights, hf_path, revision=revision, peft=peft)
        sessions.arrange(provider, settings)
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)

    def load_hf_weights(self, model: Model, hf_path: str | Path | None = None, *, revision: str | None = None,
                        strict: bool = True, allow_missing: Sequence[str] = (), allow_unexpected: Sequence[str] = (),
                        allow_bin: bool = False, allow_nonfinite: bool = False, reader: Way = "auto", dedupe: bool = False,
                        verify: bool = True, show_progress: bool = True, digest: bool = False) -> Report:  # fmt: skip
        """Fills a model from `hf_path` or the bridge's own source and, with `verify`, compares every copy bit for bit. Collective.

        Values that the parameters' dtypes can't hold are rounded, which is printed and reported; call `keep_dtypes` first to avoid
        it. `hf_path` is another checkpoint of the same model, fetched at `revision` (by default the bridge's) with the bridge's
        token and trust_remote_code. `allow_missing` and `allow_unexpected` are name patterns; all other names must match exactly
        (MappingError), unless `strict` is False: then parameters that no tensor feeds keep their values. `allow_bin` accepts
        torch's pickled files (tensors only) where there are no safetensors, `allow_nonfinite` accepts NaN and infinity; `reader`
        and `dedupe` are the settings conversion.reader and conversion.dedupe. With `digest`, the ranks read the files' tensors once
        more between them, for `import_digest`. An optimizer created before the call holds its own copies of the parameters: create
        it afterwards, or call its `reload_model_params`.
        """
        return weights.load(
            self.source,
            self.state,
            model,
            hf_path,
            revision=revision,
            strict=strict,
            allow_missing=allow_missing,
            allow_unexpected=allow_unexpected,
            allow_bin=allow_bin,
            allow_nonfinite=allow_nonfinite,
            reader=reader,
            dedupe=dedupe,
            verify=verify,
            show_progress=show_progress,
            digest=digest,
        )

    def keep_dtypes(self, model: Model, hf_path: str | Path | None = None, *, revision: str | None = None,
                    allow_bin: bool = False) -> list[torch.nn.Module]:  # fmt: skip
        """Gives each parameter of a model that is converted but never run the dtype of its tensor in the files. Collective.

        Call it before `load_hf_weights`, with the same source; the parameters' values are lost. A pre-wrap hook may call it, for a
        model that is provided with runs=False. Returns the model's chunks.
        """
        return weights.keep_dtypes(self.source, self.state, model, hf_path, revision=revision, allow_bin=allow_bin)

    def plan(self, model: Model) -> Plan:
        """Returns the conversion plan of a model; it is reused for models of the same layout. Collective."""
        return weights.model_plan(self.source, self.state, model)

    # ------------------------------------------------------------------ into files

    def save_hf_pretrained(self, model: Model, path: str | Path, show_progress: bool = True, *,
                           source_path: str | Path | None = None, strict: bool = True, weight_dtype: WeightDtype = None,
                           max_shard_size: str | int | None = None, verify: bool = True, allow_nonfinite: bool = False,
                           writer: str = "shared", quantization: str | None = None,
                           merge_adapter_weights: bool = True) -> Report:  # fmt: skip
        """Writes a complete Hugging Face folder: weights, config, generation config, tokenizer, chat template. Collective.

        `weight_dtype` is by default the parameters'; "source" gives each tensor the dtype it was imported from. Tensors of
        multi-token-prediction layers that the model was built without are written as they were imported. `source_path` is a folder
        or hub id whose config and tokenizer replace the bridge's own. `max_shard_size` is the largest size of a file; by default
        the files are the source's where all tensors have its names and dtypes, else of at most 5GB. The folder appears by one
        rename, after every tensor has been read back and compared (`verify`); an earlier export is replaced, unless somebody
        changed it or the model was read from it. Tensors with less precision than the source had are printed once and listed in the
        report. NaN and infinite values are refused unless `allow_nonfinite`. After an import with strict=False, `strict` refuses to
        export a model whose tensors differ from the source's. `writer="gather"` lets rank 0 write everything, for ranks that share
        no file system. `quantization="fp8_block"` writes the linears of layers as block-scaled FP8 and the rest in `weight_dtype`;
        the scheme is that of the source's config where it has one, else blocks of 128 x 128. Adapters are merged into the weights,
        unless `merge_adapter_weights` is False: then the frozen weights are written.
        """
        options = ExportOptions(
            strict=strict,
            weight_dtype=weight_dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            allow_nonfinite=allow_nonfinite,
            writer=writer,
            quantization=quantization,
            merge_adapter_weights=merge_adapter_weights,
            show_progress=show_progress,
        )
        return weights.save(self.source, self.state, model, Path(path), options, source_path=source_path)

    def save_hf_weights(self, model: Model, path: str | Path, show_progress: bool = True, *,
                        strict: bool = True, weight_dtype: WeightDtype = None, max_shard_size: str | int | None = None,
                        verify: bool = True, allow_nonfinite: bool = False, writer: str = "shared",
                        quantization: str | None = None, merge_adapter_weights: bool = True) -> Report:  # fmt: skip
        """Writes the weights only; otherwise as `save_hf_pretrained`. Collective."""
        options = ExportOptions(
            strict=strict,
            weight_dtype=weight_dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            allow_nonfinite=allow_nonfinite,
            writer=writer,
            quantization=quantization,
            merge_adapter_weights=merge_adapter_weights,
            show_progress=show_progress,
        )
        return weights.save(self.source, self.state, model, Path(path), options, weights_only=True)

    def push_to_hub(self, repo_id: str, model: Model | None = None, *, folder: str | Path | None = None,
                    private: bool | None = None, revision: str | None = None, commit_message: str | None = None,
                    token: str | None = None, **export: Any) -> str:  # fmt: skip
        """Uploads a model to the hub repository `repo_id`, which is created if missing, and returns the commit's URL. Collective.

        A `model` is first exported to `folder`, which is kept, or to a temporary folder (`export` are keywords of
        save_hf_pretrained); rank 0 uploads it. Without a model, `folder` is an existing export. `token` is by default the bridge's,
        then HF_TOKEN. Raises CheckpointError when the hub refuses or can't be reached.
        """
        if model is None and (folder is None or export):
            raise ConfigError("push_to_hub needs a model to export, or the folder of an export and no export keywords.")
        with sessions.scratch(folder) as place:
            if model is not None:
                self.save_hf_pretrained(model, place, **export)
            return collectives.on_rank_zero(
                "uploading",
                lambda: upload.upload(
                    place,
                    repo_id,
                    private=private,
                    revision=revision,
                    commit_message=commit_message,
                    token=token or self.source.token,
                ),
            )

    def export_dtype(self, asked: str | None = None) -> str | None:
        """The `weight_dtype` of an export where `asked` is conversion.export_dtype: by default the source's, tensor by tensor.

        None, the parameters', where no weights were imported.
        """
        return asked or (None if self.state.record is None else "source")

    def as_exported(self, model: Model, *, weight_dtype: WeightDtype = None) -> AbstractContextManager[None]:
        """While entered, parameters have the values that an export in `weight_dtype` holds; afterwards their own bits. Collective.

        What an export merges or quantises is left as it is.
        """
        return weights.as_exported(self.source, self.state, model, weight_dtype)

    def export_size(self, model: Model, *, weight_dtype: WeightDtype = None, adapters_only: bool = False) -> int:
        """Bytes of the tensors that an export of a model, or of its adapters alone, would have without quantisation. Collective."""
        if adapters_only:
            return adapters.export_size(self.source, model, weight_dtype)
        return weights.export_size(self.source, self.state, model, weight_dtype)

    # ------------------------------------------------------------------ to other programs, without files

    def export_hf_weights(self, model: Model, cpu: bool = False, show_progress: bool = True,
                          conversion_tasks: Sequence[ConversionTask] | None = None, merge_adapter_weights: bool = True, *,
                          weight_dtype: WeightDtype = None, bucket_bytes: int = BUCKET_BYTES,
                          consumers: Collection[int] | None = None) -> Generator[tuple[str, torch.Tensor]]:  # fmt: skip
        """Yields (name, whole tensor) of every Hugging Face tensor, in natural order; each tensor owns its storage.

        Collective: every rank calls it and exhausts or closes the iterator; only ranks in `consumers` (None: all) receive tensors,
        the iterators of the others are empty. `cpu` copies the tensors to the host. `conversion_tasks`, from
        `get_conversion_tasks`, selects the tensors and their order. Adapters are merged unless `merge_adapter_weights` is False.
        Memory beside the model: two buckets of `bucket_bytes` and one tensor. Raises the same MegabridgeError on every rank, also
        where another rank closed its iterator before the end. Wrap the iterator in `contextlib.closing` where an exception may keep
        it alive.
        """
        options = StreamOptions(
            conversion_tasks=conversion_tasks,
            merge_adapter_weights=merge_adapter_weights,
            weight_dtype=weight_dtype,
            cpu=cpu,
            bucket_bytes=bucket_bytes,
            consumers=consumers,
        )
        return weights.stream(self.source, self.state, model, options).tensors(show_progress=show_progress)

    def export_hf_buckets(self, model: Model, *, cpu: bool = False, conversion_tasks: Sequence[ConversionTask] | None = None,
                          merge_adapter_weights: bool = True, weight_dtype: WeightDtype = None, bucket_bytes: int = BUCKET_BYTES,
                          consumers: Collection[int] | None = None) -> Generator[tuple[torch.Tensor, Entries]]:  # fmt: skip
        """Yields the tensors of `export_hf_weights` as (flat bytes, entries), valid until the next one. Collective.

        `entry.view(flat)` is a tensor.
        """
        options = StreamOptions(
            conversion_tasks=conversion_tasks,
            merge_adapter_weights=merge_adapter_weights,
            weight_dtype=weight_dtype,
            cpu=cpu,
            bucket_bytes=bucket_bytes,
            consumers=consumers,
        )
        return weights.stream(self.source, self.state, model, options).flat()

    def export_hf_shards(self, model: Model, *, replicas: bool = False) -> Iterator[tuple[str, Box, torch.Tensor]]:
        """Yields (name, box, view of a parameter) for the parts that this rank contributes to an export. Not collective.

        With `replicas`, yields every part that it holds. Without, the boxes of all ranks tile every tensor once;
        `box.view(whole).copy_(local)` puts a part in its place. Adapters are left out.
        """
        return weights.shards(self.source, model, replicas=replicas)

    def get_conversion_tasks(self, model: Model, hf_path: str | Path | None = None) -> list[ConversionTask]:
        """Returns a task for every Hugging Face tensor, in natural order. Collective.

        With `hf_path`, the tasks have the dtypes of that checkpoint, and those of its tied copies are among them.
        """
        return weights.conversion_tasks(self.source, self.state, model, hf_path)

    # ------------------------------------------------------------------ adapters

    def add_adapters(self, model: Model, peft: LoRA, *, seed: int = 1234) -> list[torch.nn.Module]:
        """Freezes a model's unwrapped chunks, adds an adapter to each linear that `peft` names, and returns the chunks. Collective.

        A pre-wrap hook calls it, after the weights are loaded; to_megatron_provider(peft=...) registers one. The model computes the
        same as before, since B is zero. Raises the same ConfigError on every rank for names that match no linear.
        """
        return adapters.add(self.source, self.state, model, peft, seed=seed)

    def adapter_plan(self, model: Model) -> Plan:
        """Returns the conversion plan of a model's adapters, under PEFT's names. Collective. Raises ConfigError without any."""
        return adapters.adapter_plan(self.source, model)

    def load_hf_adapter(self, model: Model, path: str | Path, *, verify: bool = True, allow_nonfinite: bool = False,
                        show_progress: bool = True) -> Report:  # fmt: skip
        """Fills a model's adapters from the PEFT folder `path` and, with `verify`, compares every copy bit for bit. Collective.

        A model without adapters is given those of the folder first; it must not be wrapped for data parallelism yet. Only
        safetensors are read. Raises CheckpointError for a damaged folder, ConfigError for settings that differ from the model's or
        aren't supported, MappingError for tensors that don't fit.
        """
        return adapters.load(
            self.source, self.state, model, path, verify=verify, allow_nonfinite=allow_nonfinite, show_progress=show_progress
        )

    def save_hf_adapter(self, model: Model, path: str | Path, show_progress: bool = True, *,
                        base_model_name_or_path: str | None = None, weight_dtype: torch.dtype | str | None = None,
                        verify: bool = True, allow_nonfinite: bool = False, writer: str = "shared") -> Report:  # fmt: skip
        """Writes a model's adapters as a folder that peft.PeftModel.from_pretrained loads. Collective.

        `base_model_name_or_path` is the base model that the folder names, by default the source of this bridge's weights. The
        folder appears by one rename, after every tensor has been read back and compared; other keywords are as in
        save_hf_pretrained.
        """
        return adapters.save(
            self.source,
            self.state,
            model,
            Path(path),
            base_model_name_or_path=base_model_name_or_path,
            weight_dtype=weight_dtype,
            verify=verify,
            allow_nonfinite=allow_nonfinite,
            writer=writer,
            show_progress=show_progress,
        )

    def export_adapter_weights(self, model: Model, cpu: bool = True, show_progress: bool = True, *,
                               weight_dtype: torch.dtype | str | None = None,
                               bucket_bytes: int = BUCKET_BYTES) -> Generator[tuple[str, torch.Tensor]]:  # fmt: skip
        """Yields (name, whole tensor) of every adapter tensor, named as in a PEFT folder; otherwise as `export_hf_weights`."""
        stream = adapters.stream(self.source, model, cpu=cpu, weight_dtype=weight_dtype, bucket_bytes=bucket_bytes)
        return stream.tensors(show_progress=show_progress)

    # ------------------------------------------------------------------ native checkpoints

    def save_megatron_model(self, model: Model, path: str | Path) -> None:
        """Writes parameters, config, tokenizer and templates as a native checkpoint that any layout can load. Collective.

        `path` must not exist, or be an empty folder (CheckpointError); it appears by one rename, when it is complete.
        """
        checkpoints.save(self.source, self.state, model, path)

    def load_megatron_model(self, path: str | Path, *, dtype: torch.dtype | str | None = None, wrap_with_ddp: bool = False,
                            **settings: Any) -> list[torch.nn.Module]:  # fmt: skip
        """Builds the model of a native checkpoint, whatever layout wrote it, and returns its chunks. Collective.

        `path` is the folder of the checkpoint, of a step or of a run. `dtype` is the dtype of the parameters, by default the
        checkpoint's; `settings` are those of to_megatron_model (tp, pp, ...). Later exports with this bridge use the checkpoint's
        record of its source. A checkpoint of adapters holds no other weights: those come from this bridge's own source.
        """
        return checkpoints.load(self.source, self.state, path, dtype=dtype, wrap_with_ddp=wrap_with_ddp, settings=settings)

    def load_native_weights(self, model: Model, path: str | Path) -> None:
        """Fills a model from a native checkpoint, and takes over the checkpoint's record of its source. Collective."""
        checkpoints.load_weights(self.source, self.state, model, path)

    def adopt_checkpoint(self, model: Model, folder: Path, rounded: Casts) -> None:
        """Takes over the source record of a native checkpoint that `model` was filled from, rounding `rounded`. Collective."""
        checkpoints.adopt(self.source, self.state, model, folder, rounded)

    def keep_native_dtypes(self, model: Model, path: str | Path) -> list[torch.nn.Module]:
        """Gives each parameter of a model that is converted but never run its dtype in a native checkpoint; see `keep_dtypes`."""
        return checkpoints.keep_dtypes(model, path)

    @classmethod
    def import_ckpt(cls, hf_model_id: str | Path, megatron_path: str | Path, *, revision: str | None = None,
                    dtype: torch.dtype | str | None = None, torch_dtype: torch.dtype | str | None = None,
                    trust_remote_code: bool = False, device_map: str | None = None, token: str | None = None,
                    allow_bin: bool = False, allow_nonfinite: bool = False, show_progress: bool = True,
                    ignore_keys: Collection[str] = (), **settings: Any) -> Report:  # fmt: skip
        """Converts a Hugging Face model to a native checkpoint, with its config, tokenizer and templates.

        One process without any set-up is enough, whatever the model's size: parameters are kept in a file beside `megatron_path`,
        which must not exist, or be an empty folder; with device_map="cuda" they are kept on the device instead. Every tensor keeps
        its dtype, unless `dtype` is given for all of them. `settings` such as tp=2 distribute the work over torchrun's ranks, all
        of which call it. The other keywords are those of `from_hf_pretrained` and `load_hf_weights`.
        """
        bridge = cls.from_hf_pretrained(
            hf_model_id, revision=revision, dtype=dtype, torch_dtype=torch_dtype,
            trust_remote_code=trust_remote_code, device_map=device_map, token=token, allow_bin=allow_bin, ignore_keys=ignore_keys,
        )  # fmt: skip
        return checkpoints.import_source(
            bridge.source,
            bridge.state,
            megatron_path,
            is_cast=one_dtype(dtype, torch_dtype) is not None,
            allow_nonfinite=allow_nonfinite,
            show_progress=show_progress,
            settings=settings,
        )

    def export_ckpt(self, megatron_path: str | Path, hf_path: str | Path, show_progress: bool = True, *, strict: bool = True,
                    weight_dtype: WeightDtype = None, max_shard_size: str | int | None = None,
                    source_path: str | Path | None = None, allow_nonfinite: bool = False, quantization: str | None = None,
                    **settings: Any) -> Report:  # fmt: skip
        """Converts a native checkpoint (its folder, a step's or a run's) to a complete Hugging Face folder.

        Config, tokenizer and templates are those stored in the checkpoint, else the bridge's. `weight_dtype` is by default the
        checkpoint's, or each tensor's source dtype for a checkpoint that was converted and never trained. `quantization` is that of
        `save_hf_pretrained`. Adapters are merged into this bridge's weights; `export_adapter_ckpt` exports them alone. Processes
        and `settings` are as in `import_ckpt`.
        """
        options = ExportOptions(
            strict=strict,
            weight_dtype=weight_dtype,
            max_shard_size=max_shard_size,
            allow_nonfinite=allow_nonfinite,
            quantization=quantization,
            show_progress=show_progress,
        )
        return checkpoints.export(
            self.source, self.state, megatron_path, hf_path, options, source_path=source_path, settings=settings
        )

    def export_adapter_ckpt(self, megatron_path: str | Path, output_path: str | Path, show_progress: bool = True, *,
                            weight_dtype: torch.dtype | str | None = None, allow_nonfinite: bool = False,
                            **settings: Any) -> Report:  # fmt: skip
        """Converts a native checkpoint of adapters to a PEFT folder without the base weights; otherwise as `export_ckpt`."""
        return checkpoints.export_adapters(
            self.source,
            self.state,
            megatron_path,
            output_path,
            weight_dtype=weight_dtype,
            allow_nonfinite=allow_nonfinite,
            show_progress=show_progress,
            settings=settings,
        )
