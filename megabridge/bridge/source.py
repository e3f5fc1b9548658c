"""A Hugging Face model as the bridge knows it before any weight moves: its config, its family, its files, its provider."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch

from megabridge.bridge import sessions
from megabridge.config.value_types import shown
from megabridge.conversion import passthrough
from megabridge.conversion.passthrough import Passthrough
from megabridge.errors import CheckpointError, ConfigError, listed
from megabridge.families import all_families, family_for
from megabridge.families.core.quantization import KEY
from megabridge.families.core.registry import architecture_of
from megabridge.hf import assets, resolve
from megabridge.hf.opened_folder import OpenedFolder
from megabridge.models.provider import ModelProvider
from megabridge.models.provider_settings import DTYPES
from megabridge.native import checkpoint
from megabridge.native.source_record import SourceRecord
from megabridge.peft import LoRA
from megabridge.peft import folder as peft_folder

# Settings in which two configs of one model may differ: they change neither the parameters nor what is computed from them.
_FREE: Final = frozenset(("seq_length", "init_method_std"))


class HFModel:
    """Made by `from_hf_pretrained`, `from_hf_config` or `from_auto_config`.

    `config` is the content of config.json as published; `opened` is the folder that held it, with tokenizer and templates, as it
    was then, which exports have whatever becomes of the folder; None for one made from a config object. `location` is where the
    weights are, if anywhere; `record` tells of the weights that were imported, here or before the native checkpoint that was
    loaded, and `carried` are those that no parameter took and an export has again. `peft` says which adapters the model was given,
    if any. `ignore_keys` name keys of config.json that nothing reads and that may say anything; `unread` are those and the others
    that nothing reads, which say nothing or what transformers takes for granted.
    """

    def __init__(self, config: dict[str, Any], *, opened: OpenedFolder | None, location: str | None = None,
                 revision: str | None = None, token: str | None = None, trust_remote_code: bool = False,
                 dtype: torch.dtype | None = None, device_map: str = "auto", allow_bin: bool = False,
                 ignore_keys: Collection[str] = ()) -> None:  # fmt: skip
        self.config = config
        self.opened = opened
        self.location = location
        self.revision = revision
        self.token = token
        self.trust_remote_code = trust_remote_code
        self.device_map = device_map
        self.allow_bin = allow_bin
        self.family = family_for(config)
        self.ignore_keys = ignore_keys
        self.native = self.family.native(config, ignore=self.ignore_keys)
        self.unread = self.family.unread(config)
        self.dtype = dtype or _dtype_of(config)
        self.record: SourceRecord | None = None
        self.carried = Passthrough()
        self.peft: LoRA | None = None
        self._read_from: list[Path] = []

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, *, revision: str | None = None, dtype: torch.dtype | str | None = None,
                           torch_dtype: torch.dtype | str | None = None, trust_remote_code: bool = False,
                           device_map: str | None = None, token: str | None = None, allow_bin: bool = False,
                           ignore_keys: Collection[str] = ()) -> Self:  # fmt: skip
        """A bridge to a local folder or a hub model. Only config and tokenizer are fetched now, the weights when they are loaded.

        `revision` is a branch, tag or commit of the hub's repository; config, tokenizer and weights come from one commit. `dtype`
        (or `torch_dtype`) is the parameters', by default config.json's. `device_map` says where they live: "auto" (this rank's CUDA
        device, or the CPU where there is none), "cpu" or "cuda[:n]". Families convert by name, so code of the model never runs
        here; with `trust_remote_code` its *.py files are kept with the tokenizer and come back with every export, else they are
        not even fetched. `allow_bin` lets the weights be torch's pickled files (tensors only) where there are no others.
        `ignore_keys` name keys of config.json that nothing reads, and whose values would be refused: the model computes the same
        without them.
        Raises CheckpointError for what can't be reached or read, ConfigError for an architecture or a setting that isn't
        supported.
        """
        device = sessions.check_device_map(device_map)
        folder = resolve.resolve(str(path), revision=revision, token=token, config_only=True, code=trust_remote_code)
        opened = OpenedFolder.of(folder, code=trust_remote_code)
        return cls(
            opened.parsed(),
            opened=opened,
            location=str(path),
            revision=resolve.commit_of(folder) or revision,
            token=token,
            trust_remote_code=trust_remote_code,
            dtype=one_dtype(dtype, torch_dtype),
            device_map=device,
            allow_bin=allow_bin,
            ignore_keys=ignore_keys,
        )

    @classmethod
    def from_hf_config(cls, config: Any, *, dtype: torch.dtype | str | None = None, ignore_keys: Collection[str] = ()) -> Self:
        """A bridge from a transformers config object or a dict of its content. It has no weights and no tokenizer."""
        content = content_of(config)
        content["architectures"] = content.get("architectures") or [architecture_of(content)]
        return cls(content, opened=None, dtype=dtype_named(dtype), ignore_keys=ignore_keys)

    @classmethod
    def from_auto_config(cls, megatron_path: str | Path, hf_model_id: str | Path | None = None, trust_remote_code: bool = False, *,
                         revision: str | None = None, token: str | None = None,
                         ignore_keys: Collection[str] = ()) -> Self:  # fmt: skip
        """A bridge to a native checkpoint, from the config, tokenizer and chat template that it carries.

        `hf_model_id` (a folder or hub id, at `revision`) is where they come from instead; a checkpoint that was not written by
        megabridge needs it. `ignore_keys` are from_hf_pretrained's. Raises CheckpointError where neither has a config, ConfigError
        where both do and they contradict.
        """
        folder = checkpoint.locate(Path(megatron_path))
        own = checkpoint.assets(folder)
        if hf_model_id is None:
            if own is None:
                raise CheckpointError(f"{folder} carries no config; give hf_model_id, the model that it has the shape of.")
            opened = OpenedFolder.of(own, code=trust_remote_code)
            made = cls(opened.parsed(), opened=opened, trust_remote_code=trust_remote_code, ignore_keys=ignore_keys)
        else:
            made = cls.from_hf_pretrained(
                hf_model_id, revision=revision, token=token, trust_remote_code=trust_remote_code, ignore_keys=ignore_keys
            )
            if own is not None:
                made.check_same(assets.read_config(own), str(own))
        made.remember(folder)
        return made

    def remember(self, folder: Path) -> None:
        """Takes from a native checkpoint what `write_assets` wrote of the source, if anything. Raises CheckpointError."""
        if (own := checkpoint.assets(folder)) is not None:
            self.record = SourceRecord.read(own) or self.record
            self.carry(passthrough.read(own) or self.carried)

    def carry(self, tensors: Passthrough) -> None:
        """Takes tensors that every export has again; closes the files of those before."""
        if tensors is not self.carried:
            self.carried.close()
        self.carried = tensors

    @staticmethod
    def list_supported_models() -> list[str]:
        """Hugging Face class names that convert."""
        return sorted(all_families())

    @staticmethod
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

    @classmethod
    def can_handle(cls, path: str | Path, trust_remote_code: bool = False, *, ignore_keys: Collection[str] = ()) -> bool:
        """Whether the model at `path` converts; only its config.json is fetched.

        Raises CheckpointError when it can't be reached or is broken. `trust_remote_code` changes nothing in the answer: a model
        that only its own code can describe has no family.
        """
        del trust_remote_code
        content = assets.read_config(resolve.resolve(str(path), config_only=True, tokenizer=False))
        return cls.supports(content, ignore_keys=ignore_keys)

    def provider(self) -> ModelProvider:
        """A provider of this model that loads no weights; its settings can still be changed."""
        made = ModelProvider(self.native, family_name=self.family.architecture, unread=self.unread)
        if self.dtype is not None:
            made.params_dtype = self.dtype
        sessions.follow_device_map(made, self.device_map)
        return made

    def check_same(self, config: dict[str, Any], what: str) -> None:
        """Raises ConfigError unless `config` describes the model of this bridge."""
        other = architecture_of(config)
        if other != self.family.architecture:
            raise ConfigError(
                f"{what} is a {shown(other)[1:-1]}, this bridge converts {self.family.architecture}; give one of those."
            )
        theirs = self.family.native(config, ignore=self.ignore_keys)
        different = [
            f"{name}={theirs[name]!r}, here {value!r}"
            for name, value in self.native.items()
            if name not in _FREE and theirs[name] != value
        ]
        if different:
            raise ConfigError(f"{what} must have this bridge's settings, or be given its own bridge; it has {listed(different)}.")

    def write_hf_assets(self, folder: Path, dtype: str | None = None, quantization: Mapping[str, Any] | None = None) -> None:
        """Writes config, generation config, tokenizer and chat template of an export, as they came. One rank calls it.

        `dtype` is what config.json is to say of the weights; None leaves it. `quantization` is its quantization_config, whatever
        the source's was.
        """
        config = {key: value for key, value in self.config.items() if key != KEY}
        self._write(folder, config if quantization is None else {**config, KEY: dict(quantization)}, dtype)

    def write_assets(self, folder: Path) -> None:
        """Writes what travels with a native checkpoint: all as it came, and what is known of the source. One rank calls it."""
        self._write(folder, self.config, None)
        if self.record is not None:
            self.record.write(folder)
        if self.carried.infos:
            passthrough.write(folder, self.carried)
        if self.peft is not None:
            peft_folder.write_config(folder, self.peft, base=self.location, revision=self.revision)

    def _write(self, folder: Path, config: dict[str, Any], dtype: str | None) -> None:
        assets.write_config(folder, config, source=None if self.opened is None else self.opened.config, dtype=dtype)
        if self.opened is not None:
            self.opened.write(folder)

    @property
    def folder(self) -> Path | None:
        """Where the config, tokenizer and templates were read, if anywhere."""
        return None if self.opened is None else self.opened.folder

    def note_source(self, folder: Path) -> None:
        """Has exports keep away from a folder that weights or adapters were read from."""
        self._read_from = [*dict.fromkeys([*self._read_from, folder.absolute()])]

    @property
    def sources(self) -> list[Path]:
        """The folders that anything of the model was read from: no export takes the place of one."""
        return self._read_from if self.folder is None else [self.folder.absolute(), *self._read_from]

    def source_folder(self, *, allow_bin: bool = False) -> Path:
        """The folder of the bridge's own weights, fetched where they are on a hub. Any rank may call it.

        Raises CheckpointError where it is gone, or another model's now.
        """
        assert self.location is not None and self.opened is not None
        folder = resolve.resolve(
            self.location,
            revision=self.revision,
            token=self.token,
            code=self.trust_remote_code,
            allow_bin=allow_bin or self.allow_bin,
        )
        self.opened.check(folder)
        return folder

    @property
    def transformer_config(self) -> Any:
        """The TransformerConfig of this model on one rank."""
        provider = self.provider()
        provider.finalize()
        return provider.config

    @property
    def mla_transformer_config(self) -> Any:
        """The MLATransformerConfig of a model with multi-latent attention. Raises ConfigError for any other."""
        if not self.native.get("multi_latent_attention"):
            raise ConfigError(f"{self.family.architecture} has no multi-latent attention; use transformer_config.")
        return self.transformer_config


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
