"""AutoBridge: one object that knows a Hugging Face model and moves it into Megatron-Core and back.

Names and signatures are Megatron Bridge's; further keywords are keyword-only. Models are lists of chunks. Methods that take a
model are collective: every rank calls them.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megabridge.bridge import hub, sessions
from megabridge.bridge.adapters import HFAdapters, Peft
from megabridge.bridge.source import dtype_named, one_dtype
from megabridge.bridge.weights import Model, WeightDtype
from megabridge.conversion.report import Report
from megabridge.errors import ConfigError
from megabridge.hf import assets
from megabridge.models.provider import ModelProvider
from megabridge.models.provider_settings import DTYPES
from megabridge.native import checkpoint
from megabridge.parallel import collectives
from megabridge.peft import folder as peft_folder


class AutoBridge(HFAdapters):
    """A Hugging Face model (see `ModelSource`) and its ways into Megatron-Core and back (see also `HFWeights` and `HFAdapters`)."""

    # ------------------------------------------------------------------ into Megatron

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | Path | None = None, *, revision: str | None = None,
                             peft: Peft | None = None) -> ModelProvider:  # fmt: skip
        """A provider of this model. With `load_weights`, providing it also fills it from `hf_path` or the bridge's own source.

        `peft` freezes it and adds adapters: new ones by their settings, or those of a PEFT folder (see `HFAdapters`).
        """
        provider = self.provider()
        if not load_weights and hf_path is not None:
            raise ConfigError(f"hf_path={str(hf_path)!r} has no meaning with load_weights=False; leave one of them out.")
        if load_weights and hf_path is None and self.location is None:
            raise ConfigError(
                "a bridge made from a config has no weights; call to_megatron_provider(load_weights=False), give hf_path, or use "
                "load_megatron_model for a native checkpoint."
            )

        if load_weights:
            provider.perform_initialization = False  # every element is filled by the import
            provider.register_pre_wrap_hook(partial(self._loaded, hf_path=hf_path, revision=revision))
        if peft is not None:
            provider.backend = "torch"  # adapters know its linears, and not Transformer Engine's
            provider.register_pre_wrap_hook(partial(self.adapt, peft=peft))
        return provider

    def _loaded(self, chunks: list[torch.nn.Module], hf_path: str | Path | None = None,
                revision: str | None = None) -> list[torch.nn.Module]:  # fmt: skip
        self.load_hf_weights(chunks, hf_path, revision=revision)
        return chunks

    def to_megatron_model(self, load_weights: bool = True, hf_path: str | Path | None = None, *, revision: str | None = None,
                          wrap_with_ddp: bool = False, peft: Peft | None = None,
                          **settings: Any) -> list[torch.nn.Module]:  # fmt: skip
        """The model itself, without data-parallel wrapping unless `wrap_with_ddp`.

        `settings` are the provider's, such as tensor_model_parallel_size=2, or sizes by their short names (tp, pp, vpp, cp, ep,
        etp). Without any size the layout is that of the process groups that run, else a single process.
        """
        provider = self.to_megatron_provider(load_weights, hf_path, revision=revision, peft=peft)
        sessions.arrange(provider, settings)
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)

    # ------------------------------------------------------------------ to the hub

    def push_to_hub(self, repo_id: str, model: Model | None = None, *, folder: str | Path | None = None,
                    private: bool | None = None, revision: str | None = None, commit_message: str | None = None,
                    token: str | None = None, **export: Any) -> str:  # fmt: skip
        """Uploads a model to the hub's repository `repo_id`, made where it is missing, and returns the commit's URL. Collective.

        A `model` is exported first (`export` are save_hf_pretrained's keywords), verified, and uploaded by rank 0: by way of
        `folder`, which stays, or of a temporary one. Without a model, `folder` is an export that exists. `token` is by default the
        bridge's, then HF_TOKEN. Raises CheckpointError when the hub refuses or can't be reached.
        """
        if model is None and (folder is None or export):
            raise ConfigError("push_to_hub needs a model to export, or the folder of an export and no keywords of one.")
        with sessions.scratch(folder) as place:
            if model is not None:
                self.save_hf_pretrained(model, place, **export)
            return collectives.on_rank_zero(
                "uploading",
                lambda: hub.upload(
                    place, repo_id, private=private, revision=revision, commit_message=commit_message, token=token or self.token
                ),
            )

    # ------------------------------------------------------------------ native checkpoints

    def save_megatron_model(self, model: Model, path: str | Path) -> None:
        """Writes parameters, config, tokenizer and templates as a native checkpoint that any layout can load. Collective.

        `path` must not exist or be empty (CheckpointError); it appears by one rename, when it is complete.
        """
        folder = sessions.target(path, replace=False)
        checkpoint.save(folder, list(model), progress=checkpoint.TrainingProgress(), write_assets=self.write_assets)

    def load_megatron_model(self, path: str | Path, *, dtype: torch.dtype | str | None = None, wrap_with_ddp: bool = False,
                            **settings: Any) -> list[torch.nn.Module]:  # fmt: skip
        """The model of a native checkpoint: of its folder, a step's or a run's. Written under any layout. Collective.

        `dtype` is the parameters', by default the checkpoint's; `settings` are to_megatron_model's (tp, pp, ...). An export with
        this bridge afterwards has what the checkpoint keeps of its source. A checkpoint of adapters has these alone: the rest is
        this bridge's own source.
        """
        provider, folder = self._native_provider(path, dtype, settings)
        self._hook_adapters(provider, folder, load_weights=True)
        chunks = provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp, init="empty")
        self.load_native_weights(chunks, folder)
        return chunks

    def load_native_weights(self, model: Model, path: str | Path) -> None:
        """Fills a model from a native checkpoint, and takes over what that keeps of its source. Collective."""
        folder = checkpoint.locate(Path(path))
        self.note_source(folder)
        rounded = checkpoint.load_weights(folder, model)
        with collectives.raise_together("reading what a native checkpoint carries"):
            self.remember(folder)
        self.tell("rounded, because the model's parameters can't hold what the native checkpoint has", rounded)
        self.note_rounding(model, rounded)

    def keep_native_dtypes(self, model: Model, path: str | Path) -> list[torch.nn.Module]:
        """Has a model that is converted and never run hold each tensor as a native checkpoint has it; see `keep_dtypes`."""
        checkpoint.keep_dtypes(checkpoint.locate(Path(path)), model)
        return list(model)

    def _native_provider(
        self, path: str | Path, dtype: torch.dtype | str | None, settings: dict[str, Any]
    ) -> tuple[ModelProvider, Path]:
        with collectives.raise_together("opening a native checkpoint"):
            folder = checkpoint.locate(Path(path))
            if (own := checkpoint.assets(folder)) is not None:
                self.check_same(assets.read_config(own), str(folder))
            provider = self.provider()
            stored = checkpoint.read_info(folder).dtype
            if (wanted := dtype_named(dtype) or stored) in DTYPES.values():  # a model can't compute in others
                provider.params_dtype = wanted
            sessions.arrange(provider, settings)
        return provider, folder

    def _hook_adapters(self, provider: ModelProvider, folder: Path, *, load_weights: bool, keeps_dtypes: bool = False) -> bool:
        """Has `provider` give its model the adapters of a native checkpoint, if any, and this bridge's weights.

        Returns whether the checkpoint holds adapters. Every rank calls it.
        """
        with collectives.raise_together("opening a native checkpoint"):
            own = checkpoint.assets(folder)
            peft = None if own is None or not (own / assets.ADAPTER).is_file() else peft_folder.read_config(own)
            if peft is not None and load_weights and self.location is None:
                raise ConfigError(f"{folder} holds adapters alone; use a bridge from_hf_pretrained of the model that they are for.")
        if peft is None:
            return False
        if load_weights:
            if keeps_dtypes:
                provider.register_pre_wrap_hook(self.keep_dtypes)
            provider.register_pre_wrap_hook(self._loaded)
        provider.backend = "torch" if provider.backend == "auto" else provider.backend
        provider.register_pre_wrap_hook(partial(self.add_adapters, peft=peft))
        return True

    @classmethod
    def import_ckpt(cls, hf_model_id: str | Path, megatron_path: str | Path, *, revision: str | None = None,
                    dtype: torch.dtype | str | None = None, torch_dtype: torch.dtype | str | None = None,
                    trust_remote_code: bool = False, device_map: str | None = None, token: str | None = None,
                    allow_bin: bool = False, allow_nonfinite: bool = False, show_progress: bool = True,
                    ignore_keys: Collection[str] = (), **settings: Any) -> Report:  # fmt: skip
        """A Hugging Face model as a native checkpoint, with its config, tokenizer and templates.

        One process without any set-up is enough, whatever the model's size: parameters are kept in a file beside
        `megatron_path`, which must not exist or be empty; with device_map="cuda" they go to the device instead. Every tensor keeps
        its dtype, unless a `dtype` is given for all of them. `settings` such as tp=2 spread the work over torchrun's ranks; every
        rank calls it then. The other keywords are those of `from_hf_pretrained` and `load_hf_weights`.
        """
        bridge = cls.from_hf_pretrained(
            hf_model_id, revision=revision, dtype=dtype, torch_dtype=torch_dtype,
            trust_remote_code=trust_remote_code, device_map=device_map, token=token, allow_bin=allow_bin, ignore_keys=ignore_keys,
        )  # fmt: skip
        provider = bridge.provider()
        sessions.arrange(provider, settings)
        is_cast = one_dtype(dtype, torch_dtype) is not None
        if not is_cast:
            provider.register_pre_wrap_hook(bridge.keep_dtypes)
        with sessions.borrowed_groups(provider):
            folder = sessions.target(megatron_path, replace=False)
            chunks = sessions.provide_unfilled(provider, folder.parent, bridge.device_map, runs=is_cast)
            report = bridge.load_hf_weights(chunks, allow_nonfinite=allow_nonfinite, show_progress=show_progress)
            bridge.save_megatron_model(chunks, folder)
        return report

    def export_ckpt(self, megatron_path: str | Path, hf_path: str | Path, show_progress: bool = True, *, strict: bool = True,
                    weight_dtype: WeightDtype = None, max_shard_size: str | int | None = None,
                    source_path: str | Path | None = None, allow_nonfinite: bool = False, quantization: str | None = None,
                    **settings: Any) -> Report:  # fmt: skip
        """A native checkpoint (its folder, a step's or a run's) as a complete Hugging Face folder; as `import_ckpt` otherwise.

        Config, tokenizer and templates are those that the checkpoint carries, else the bridge's. `weight_dtype` is by default the
        checkpoint's, and each tensor's source dtype for a checkpoint that was converted and never trained. `quantization` is that
        of `save_hf_pretrained`. Adapters are merged into this bridge's weights; `export_adapter_ckpt` exports them alone.
        """
        provider, folder = self._native_provider(megatron_path, None, settings)
        carries = (folder / checkpoint.ASSETS).is_dir() and not self._hook_adapters(
            provider, folder, load_weights=True, keeps_dtypes=True
        )
        own: AutoBridge = self
        if carries:
            own = AutoBridge.from_auto_config(folder, trust_remote_code=self.trust_remote_code, ignore_keys=self.ignore_keys)
        own.token = self.token
        provider.register_pre_wrap_hook(partial(self.keep_native_dtypes, path=folder))
        with sessions.borrowed_groups(provider):
            output = sessions.target(hf_path, replace=True)
            chunks = sessions.provide_unfilled(provider, output.parent, self.device_map)
            own.load_native_weights(chunks, folder)
            if weight_dtype is None and own.record is not None and not checkpoint.read_info(folder).is_trained:
                weight_dtype = "source"
            return own.save_hf_pretrained(
                chunks,
                output,
                show_progress,
                source_path=source_path,
                strict=strict,
                weight_dtype=weight_dtype,
                max_shard_size=max_shard_size,
                allow_nonfinite=allow_nonfinite,
                quantization=quantization,
            )

    def export_adapter_ckpt(self, megatron_path: str | Path, output_path: str | Path, show_progress: bool = True, *,
                            weight_dtype: torch.dtype | str | None = None, allow_nonfinite: bool = False,
                            **settings: Any) -> Report:  # fmt: skip
        """A native checkpoint of adapters as a PEFT folder; the model's own weights aren't read. As `export_ckpt` otherwise."""
        provider, folder = self._native_provider(megatron_path, None, settings)
        if not self._hook_adapters(provider, folder, load_weights=False):
            raise ConfigError(f"{folder} holds a whole model; use export_ckpt.")
        provider.register_pre_wrap_hook(partial(self.keep_native_dtypes, path=folder))
        with sessions.borrowed_groups(provider):
            output = sessions.target(output_path, replace=True)
            chunks = sessions.provide_unfilled(provider, output.parent, self.device_map)
            self.load_native_weights(chunks, folder)
            return self.save_hf_adapter(chunks, output, show_progress, weight_dtype=weight_dtype, allow_nonfinite=allow_nonfinite)
