"""The source of a bridge: a Hugging Face model's config, family, files and provider, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, override

import torch

from megabridge.bridge import sessions
from megabridge.config.value_types import differences, shown
from megabridge.conversion import first_values
from megabridge.errors import CheckpointError, ConfigError, listed
from megabridge.families import Family, family_for
from megabridge.families.core.quantization import KEY
from megabridge.families.core.registry import architecture_of
from megabridge.hf import assets, resolve
from megabridge.hf.opened_folder import OpenedFolder
from megabridge.models.provider import ModelProvider
from megabridge.models.provider_settings import DTYPES
from megabridge.native import checkpoint
from megabridge.parallel import process_groups

# Settings that may differ between two configs of one model: they change neither the parameters nor what is computed from them.
_FREE: Final = frozenset(("seq_length", "init_method_std"))


@dataclass(frozen=True, eq=False)
class ModelSource:
    """The immutable description of a Hugging Face model. `AutoBridge.source` is one.

    `config` is the content of config.json as published, `native` the equivalent settings of the provider. `opened` is the content
    of its folder (config, tokenizer, templates) when it was opened; exports write that content, whatever happens to the folder
    later. It is None for a source made from a config object. `location` is where the weights are: a folder, or a hub id at
    `revision`; None without weights. `ignore_keys` names keys of config.json that nothing reads and that may have any value;
    `unread` lists these and the other keys that nothing reads, whose values are empty or transformers' defaults.
    """

    config: dict[str, Any]
    family: Family
    native: dict[str, Any]
    unread: list[str]
    opened: OpenedFolder | None = None
    location: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    dtype: torch.dtype | None = None
    device_map: str = "auto"
    allow_bin: bool = False
    ignore_keys: Collection[str] = ()

    @override
    def __repr__(self) -> str:
        return f"ModelSource({self.family.architecture}, {'a config' if self.location is None else self.location})"

    @property
    def folder(self) -> Path | None:
        """The folder that config, tokenizer and templates were read from, if any."""
        return None if self.opened is None else self.opened.folder


def describe(config: dict[str, Any], *, dtype: torch.dtype | None = None, ignore_keys: Collection[str] = (),
             **where: Any) -> ModelSource:  # fmt: skip
    """Returns the source for a config.json's content. Raises ConfigError for an architecture or a setting that isn't supported."""
    family = family_for(config)
    native = family.native(config, ignore=ignore_keys)
    dtype = dtype or _dtype_of(config)
    return ModelSource(config, family, native, family.unread(config), dtype=dtype, ignore_keys=ignore_keys, **where)


def from_pretrained(path: str | Path, *, revision: str | None = None, dtype: torch.dtype | None = None,
                    trust_remote_code: bool = False, device_map: str | None = None, token: str | None = None,
                    allow_bin: bool = False, ignore_keys: Collection[str] = ()) -> ModelSource:  # fmt: skip
    """See AutoBridge.from_hf_pretrained."""
    device = sessions.check_device_map(device_map)
    folder = resolve.resolve(str(path), revision=revision, token=token, config_only=True, code=trust_remote_code)
    opened = OpenedFolder.of(folder, code=trust_remote_code)
    return describe(
        opened.parsed(),
        opened=opened,
        location=str(path),
        revision=resolve.commit_of(folder) or revision,
        token=token,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        device_map=device,
        allow_bin=allow_bin,
        ignore_keys=ignore_keys,
    )


def from_config(config: Any, *, dtype: torch.dtype | None = None, ignore_keys: Collection[str] = ()) -> ModelSource:
    """Returns the source for a transformers config object, or a dict of its content: it has no weights and no tokenizer."""
    content = content_of(config)
    content["architectures"] = content.get("architectures") or [architecture_of(content)]
    return describe(content, dtype=dtype, ignore_keys=ignore_keys)


def from_native(folder: Path, hf_model_id: str | Path | None = None, *, trust_remote_code: bool = False,
                revision: str | None = None, token: str | None = None,
                ignore_keys: Collection[str] = ()) -> ModelSource:  # fmt: skip
    """Returns the source stored in the native checkpoint `folder`, or that of `hf_model_id`; see AutoBridge.from_auto_config."""
    own = checkpoint.assets(folder)
    if hf_model_id is None:
        if own is None:
            raise CheckpointError(f"{folder} has no config; give hf_model_id, a model of the same shape.")
        opened = OpenedFolder.of(own, code=trust_remote_code)
        return describe(opened.parsed(), opened=opened, trust_remote_code=trust_remote_code, ignore_keys=ignore_keys)
    made = from_pretrained(
        hf_model_id, revision=revision, token=token, trust_remote_code=trust_remote_code, ignore_keys=ignore_keys
    )
    if own is not None:
        check_same(made, assets.read_config(own), str(own))
    return made


def supports(config: Any, *, ignore_keys: Collection[str] = ()) -> bool:
    """Returns whether a config (object or dict) converts: its architecture and every setting are supported."""
    try:
        content = content_of(config)
        family = family_for(content)
        ModelProvider(family.native(content, ignore=ignore_keys), family_name=family.architecture).finalize()
        _dtype_of(content)
    except ConfigError:
        return False
    return True


def provider(source: ModelSource) -> ModelProvider:
    """Returns a provider of the model that loads no weights and can still be changed. Random weights follow from the seed."""
    made = ModelProvider(source.native, family_name=source.family.architecture, unread=source.unread)
    if source.dtype is not None:
        made.params_dtype = source.dtype
    sessions.follow_device_map(made, source.device_map)
    made.draw_by(
        lambda chunk, deviations: first_values.draw(
            chunk, deviations, family=source.family, native=source.native, seed=process_groups.current_seed()
        )
    )
    return made


def check_same(source: ModelSource, config: dict[str, Any], what: str) -> None:
    """Raises ConfigError unless `config` describes the source's model."""
    other = architecture_of(config)
    if other != source.family.architecture:
        raise ConfigError(
            f"{what} is a {shown(other)[1:-1]}, this bridge converts {source.family.architecture}; give one of those."
        )
    theirs = source.family.native(config, ignore=source.ignore_keys)
    different = [
        f"{part}={shown(other)}, here {shown(own)}"
        for name, value in source.native.items()
        if name not in _FREE
        for part, own, other in differences(value, theirs[name], name)
    ]
    if different:
        raise ConfigError(f"{what} must have this bridge's settings, or be given its own bridge; it has {listed(different)}.")


def weights_folder(source: ModelSource, *, allow_bin: bool = False) -> Path:
    """Returns the folder of the source's weights, after fetching them from a hub. Any rank may call it.

    Raises CheckpointError where the folder is gone, or holds another model now.
    """
    assert source.location is not None and source.opened is not None
    folder = resolve.resolve(
        source.location,
        revision=source.revision,
        token=source.token,
        code=source.trust_remote_code,
        allow_bin=allow_bin or source.allow_bin,
    )
    source.opened.check(folder)
    return folder


def write_hf_assets(source: ModelSource, folder: Path, dtype: str | None = None,
                    quantization: Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Writes config, generation config, tokenizer and chat template of an export, as the source has them. One rank calls it.

    `dtype` is the dtype of the weights that config.json states; None leaves it. `quantization` replaces the source's
    quantization_config; None removes it.
    """
    config = {key: value for key, value in source.config.items() if key != KEY}
    write_files(source, folder, config if quantization is None else {**config, KEY: dict(quantization)}, dtype)


def write_files(source: ModelSource, folder: Path, config: dict[str, Any], dtype: str | None = None) -> None:
    """Writes `config` and the other files that were opened with it. One rank calls it."""
    assets.write_config(folder, config, source=None if source.opened is None else source.opened.config, dtype=dtype)
    if source.opened is not None:
        source.opened.write(folder)


def content_of(config: Any) -> dict[str, Any]:
    """Returns a config object of transformers, or a dict, as the content of a config.json. Raises ConfigError for anything else."""
    if isinstance(config, Mapping):
        return dict(config)
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        raise ConfigError(f"a config must be a dict or a config object of transformers, not {shown(config)}.")
    try:
        content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{type(config).__name__} can't be written as JSON: {error}; correct its settings.") from error
    return content


def dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the dtype that `dtype` is or names. Raises ConfigError for an unknown name."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(f"dtype={shown(dtype)} must be one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the dtype given under either of two keywords; transformers' "auto" stands for the default, config.json's."""
    given = {dtype_named(None if value == "auto" else value) for value in (dtype, torch_dtype) if value is not None}
    if len(given) > 1:
        raise ConfigError(f"dtype={dtype!r} and torch_dtype={torch_dtype!r} are two names for one thing; give one.")
    return given.pop() if given else None


def _dtype_of(config: dict[str, Any]) -> torch.dtype | None:
    for key in assets.DTYPE_KEYS:
        given = config.get(key)
        if given is not None:
            name = given.removeprefix("torch.") if isinstance(given, str) else given
            if not isinstance(name, str) or name not in DTYPES:
                raise ConfigError(
                    f"config.json's {key}={shown(given)} must be one of {', '.join(DTYPES)}, or give dtype= in its place."
                )
            return DTYPES[name]
    return None
