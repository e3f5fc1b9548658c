"""A Hugging Face model as a bridge knows it before any weight moves: its config, its family, its files, its provider."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, override

import torch

from megabridge.bridge import sessions
from megabridge.config.value_types import differences, shown
from megabridge.errors import CheckpointError, ConfigError, listed
from megabridge.families import Family, family_for
from megabridge.families.core.quantization import KEY
from megabridge.families.core.registry import architecture_of
from megabridge.hf import assets, resolve
from megabridge.hf.opened_folder import OpenedFolder
from megabridge.models.provider import ModelProvider
from megabridge.models.provider_settings import DTYPES
from megabridge.native import checkpoint

# Settings in which two configs of one model may differ: they change neither the parameters nor what is computed from them.
_FREE: Final = frozenset(("seq_length", "init_method_std"))


@dataclass(frozen=True, eq=False)
class ModelSource:
    """What is known of a Hugging Face model; nothing changes it. `AutoBridge.source` is one.

    `config` is the content of config.json as published, `native` the provider's settings that it means. `opened` is the folder that
    held it, with tokenizer and templates, as it was then, which exports have whatever becomes of the folder; None for one made from
    a config object. `location` is where the weights are, if anywhere: a folder, or a hub id at `revision`. `ignore_keys` name keys
    of config.json that nothing reads and that may say anything; `unread` are those and the others that nothing reads, which say
    nothing or what transformers takes for granted.
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
        """Where the config, tokenizer and templates were read, if anywhere."""
        return None if self.opened is None else self.opened.folder


def describe(config: dict[str, Any], *, dtype: torch.dtype | None = None, ignore_keys: Collection[str] = (),
             **where: Any) -> ModelSource:  # fmt: skip
    """The source of a config.json's content. Raises ConfigError for an architecture or a setting that isn't supported."""
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
    """The source of a transformers config object, or of a dict of its content: it has no weights and no tokenizer."""
    content = content_of(config)
    content["architectures"] = content.get("architectures") or [architecture_of(content)]
    return describe(content, dtype=dtype, ignore_keys=ignore_keys)


def from_native(folder: Path, hf_model_id: str | Path | None = None, *, trust_remote_code: bool = False,
                revision: str | None = None, token: str | None = None,
                ignore_keys: Collection[str] = ()) -> ModelSource:  # fmt: skip
    """The source of what the native checkpoint `folder` carries, or of `hf_model_id`; see AutoBridge.from_auto_config."""
    own = checkpoint.assets(folder)
    if hf_model_id is None:
        if own is None:
            raise CheckpointError(f"{folder} carries no config; give hf_model_id, the model that it has the shape of.")
        opened = OpenedFolder.of(own, code=trust_remote_code)
        return describe(opened.parsed(), opened=opened, trust_remote_code=trust_remote_code, ignore_keys=ignore_keys)
    made = from_pretrained(
        hf_model_id, revision=revision, token=token, trust_remote_code=trust_remote_code, ignore_keys=ignore_keys
    )
    if own is not None:
        check_same(made, assets.read_config(own), str(own))
    return made


def supports(config: Any, *, ignore_keys: Collection[str] = ()) -> bool:
    """Whether a config (object or dict) converts: its architecture is known and every setting can be represented."""
    try:
        content = content_of(config)
        family = family_for(content)
        ModelProvider(family.native(content, ignore=ignore_keys), family_name=family.architecture).finalize()
        _dtype_of(content)
    except ConfigError:
        return False
    return True


def provider(source: ModelSource) -> ModelProvider:
    """A provider of the model that loads no weights; its settings can still be changed."""
    made = ModelProvider(source.native, family_name=source.family.architecture, unread=source.unread)
    if source.dtype is not None:
        made.params_dtype = source.dtype
    sessions.follow_device_map(made, source.device_map)
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
    """The folder of the source's weights, fetched where they are on a hub. Any rank may call it.

    Raises CheckpointError where it is gone, or another model's now.
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
    """Writes config, generation config, tokenizer and chat template of an export, as they came. One rank calls it.

    `dtype` is what config.json is to say of the weights; None leaves it. `quantization` is its quantization_config, whatever the
    source's was.
    """
    config = {key: value for key, value in source.config.items() if key != KEY}
    write_files(source, folder, config if quantization is None else {**config, KEY: dict(quantization)}, dtype)


def write_files(source: ModelSource, folder: Path, config: dict[str, Any], dtype: str | None = None) -> None:
    """Writes `config` and what else was opened with it. One rank calls it."""
    assets.write_config(folder, config, source=None if source.opened is None else source.opened.config, dtype=dtype)
    if source.opened is not None:
        source.opened.write(folder)


def content_of(config: Any) -> dict[str, Any]:
    """A config object of transformers, or a dict, as the content of a config.json. Raises ConfigError for anything else."""
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
    """The dtype that `dtype` is or names. Raises ConfigError."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(f"dtype={shown(dtype)} must be one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that two names for one keyword give; transformers' "auto" is the default, config.json's."""
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
