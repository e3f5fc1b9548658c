"""Writes, loads and converts native checkpoints of a bridge's model. Functions are collective unless they say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megabridge.bridge import adapters, sessions, weights
from megabridge.bridge import source as sources
from megabridge.bridge.source import ModelSource, dtype_named
from megabridge.bridge.state import BridgeState
from megabridge.bridge.weights import ExportOptions, Model
from megabridge.conversion import passthrough
from megabridge.conversion.report import Report
from megabridge.errors import ConfigError
from megabridge.hf import assets
from megabridge.hf.dtypes import Casts
from megabridge.models.provider import ModelProvider
from megabridge.models.provider_settings import DTYPES
from megabridge.native import checkpoint
from megabridge.parallel import collectives
from megabridge.peft import folder as peft_folder


def write_assets(source: ModelSource, state: BridgeState, folder: Path) -> None:
    """See AutoBridge.write_assets. One rank calls it."""
    sources.write_files(source, folder, source.config)
    if state.record is not None:
        state.record.write(folder)
    if state.passthrough.infos:
        passthrough.write(folder, state.passthrough)
    if state.peft is not None:
        peft_folder.write_config(folder, state.peft, base=source.location, revision=source.revision)


def save(source: ModelSource, state: BridgeState, model: Model, path: str | Path) -> None:
    """See AutoBridge.save_megatron_model."""
    folder = sessions.target(path, replace=False)
    checkpoint.save(folder, list(model), progress=checkpoint.TrainingProgress(), write_assets=partial(write_assets, source, state))


def load(source: ModelSource, state: BridgeState, path: str | Path, *, dtype: torch.dtype | str | None, wrap_with_ddp: bool,
         settings: Mapping[str, Any]) -> list[torch.nn.Module]:  # fmt: skip
    """See AutoBridge.load_megatron_model."""
    provider, folder = provider_for(source, path, dtype, settings)
    hook_adapters(source, state, provider, folder, load_weights=True)
    chunks = provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp, init="empty")
    load_weights(source, state, chunks, folder)
    return chunks


def load_weights(source: ModelSource, state: BridgeState, model: Model, path: str | Path) -> None:
    """See AutoBridge.load_native_weights."""
    folder = checkpoint.locate(Path(path))
    state.note_source(folder)
    rounded = checkpoint.load_weights(folder, model)
    adopt(source, state, model, folder, rounded)
    state.print_casts("rounded, because the model's parameters can't hold what the native checkpoint has", rounded)


def adopt(source: ModelSource, state: BridgeState, model: Model, folder: Path, rounded: Casts) -> None:
    """See AutoBridge.adopt_checkpoint."""
    with collectives.raise_together("reading a native checkpoint's record of its source"):
        state.remember(folder)
    weights.note_rounding(source, state, model, rounded)


def keep_dtypes(model: Model, path: str | Path) -> list[torch.nn.Module]:
    """See AutoBridge.keep_native_dtypes."""
    checkpoint.keep_dtypes(checkpoint.locate(Path(path)), model)
    return list(model)


def provider_for(
    source: ModelSource, path: str | Path, dtype: torch.dtype | str | None, settings: Mapping[str, Any]
) -> tuple[ModelProvider, Path]:
    """Returns a provider for the model of the native checkpoint at `path`, and the checkpoint's folder."""
    with collectives.raise_together("opening a native checkpoint"):
        folder = checkpoint.locate(Path(path))
        if (own := checkpoint.assets(folder)) is not None:
            sources.check_same(source, assets.read_config(own), str(folder))
        provider = sources.provider(source)
        stored = checkpoint.read_info(folder).dtype
        if (wanted := dtype_named(dtype) or stored) in DTYPES.values():  # a model can't compute in other dtypes
            provider.params_dtype = wanted
        sessions.arrange(provider, settings)
    return provider, folder


def hook_adapters(source: ModelSource, state: BridgeState, provider: ModelProvider, folder: Path, *, load_weights: bool,
                  keeps_dtypes: bool = False) -> bool:  # fmt: skip
    """Returns whether a native checkpoint holds adapters; if so, registers a hook of `provider` that adds them to its model.

    With `load_weights`, an earlier hook loads the source's weights.
    """
    with collectives.raise_together("opening a native checkpoint"):
        own = checkpoint.assets(folder)
        peft = None if own is None or not (own / assets.ADAPTER).is_file() else peft_folder.read_config(own)
        if peft is not None and load_weights and source.location is None:
            raise ConfigError(f"{folder} holds only adapters; use a bridge made by from_hf_pretrained from their base model.")
    if peft is None:
        return False
    if load_weights:
        if keeps_dtypes:
            provider.register_pre_wrap_hook(partial(weights.keep_dtypes, source, state))
        provider.register_pre_wrap_hook(partial(weights.loaded, source, state))
    provider.adapted = True
    provider.register_pre_wrap_hook(partial(adapters.adapt, source, state, peft=peft))
    return True


def import_source(source: ModelSource, state: BridgeState, megatron_path: str | Path, *, is_cast: bool, allow_nonfinite: bool,
                  show_progress: bool, settings: Mapping[str, Any]) -> Report:  # fmt: skip
    """See AutoBridge.import_ckpt."""
    provider = sources.provider(source)
    sessions.arrange(provider, settings)
    if not is_cast:
        provider.register_pre_wrap_hook(partial(weights.keep_dtypes, source, state))
    with sessions.borrowed_groups(provider):
        folder = sessions.target(megatron_path, replace=False)
        chunks = sessions.provide_unfilled(provider, folder.parent, source.device_map, runs=is_cast)
        report = weights.load(source, state, chunks, allow_nonfinite=allow_nonfinite, show_progress=show_progress)
        save(source, state, chunks, folder)
    return report


def export(source: ModelSource, state: BridgeState, megatron_path: str | Path, hf_path: str | Path, options: ExportOptions, *,
           source_path: str | Path | None, settings: Mapping[str, Any]) -> Report:  # fmt: skip
    """See AutoBridge.export_ckpt."""
    provider, folder = provider_for(source, megatron_path, None, settings)
    has_own_source = (folder / checkpoint.ASSETS).is_dir() and not hook_adapters(
        source, state, provider, folder, load_weights=True, keeps_dtypes=True
    )
    own, own_state = source, state
    if has_own_source:
        own = sources.from_native(
            folder, trust_remote_code=source.trust_remote_code, token=source.token, ignore_keys=source.ignore_keys
        )
        own_state = BridgeState()
        own_state.remember(folder)
    provider.register_pre_wrap_hook(partial(keep_dtypes, path=folder))
    with sessions.borrowed_groups(provider):
        output = sessions.target(hf_path, replace=True)
        chunks = sessions.provide_unfilled(provider, output.parent, source.device_map)
        load_weights(own, own_state, chunks, folder)
        if options.weight_dtype is None and own_state.record is not None and not checkpoint.read_info(folder).is_trained:
            options = replace(options, weight_dtype="source")
        return weights.save(own, own_state, chunks, output, options, source_path=source_path)


def export_adapters(source: ModelSource, state: BridgeState, megatron_path: str | Path, output_path: str | Path, *,
                    weight_dtype: torch.dtype | str | None, allow_nonfinite: bool, show_progress: bool,
                    settings: Mapping[str, Any]) -> Report:  # fmt: skip
    """See AutoBridge.export_adapter_ckpt."""
    provider, folder = provider_for(source, megatron_path, None, settings)
    if not hook_adapters(source, state, provider, folder, load_weights=False):
        raise ConfigError(f"{folder} holds a whole model; use export_ckpt.")
    provider.register_pre_wrap_hook(partial(keep_dtypes, path=folder))
    with sessions.borrowed_groups(provider):
        output = sessions.target(output_path, replace=True)
        chunks = sessions.provide_unfilled(provider, output.parent, source.device_map)
        load_weights(source, state, chunks, folder)
        return adapters.save(
            source, state, chunks, output, weight_dtype=weight_dtype, allow_nonfinite=allow_nonfinite, show_progress=show_progress
        )
