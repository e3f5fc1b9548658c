"""Family: the config fields and weight rules of one Hugging Face architecture, as data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from megabridge.config.value_types import OBJECT, Kind, is_deep, shown
from megabridge.errors import ConfigError, listed
from megabridge.families.core import unread_keys
from megabridge.families.core.fields import FieldLike, Json
from megabridge.families.core.quantization import quantization_of
from megabridge.families.core.ranges import RANGES
from megabridge.mapping import Dims, WeightMap


@dataclass(frozen=True)
class Parameters:
    """Facts for PEFT's adapters of a 3-D parameter of transformers' model that holds all experts of a layer.

    `is_transposed` is that attribute of transformers' class of the experts; `names` are pairs of a name's suffix in files and in
    the model where they differ.
    """

    is_transposed: bool
    names: tuple[tuple[str, str], ...] = ()

    def name(self, tensor: str) -> str:
        """Returns the parameter's name in transformers' model for `tensor`, its name in files."""
        for end, other in self.names:
            if tensor.endswith(end):
                return tensor.removesuffix(end) + other
        return tensor


@dataclass(frozen=True)
class Family:
    """One architecture.

    `architecture` is the Hugging Face class name and `model_type` its config's; `tiny` is a small config.json that still
    exercises every rule; `ignored` are name patterns of tensors in files that no parameter needs; `passthrough` are those of
    multi-token-prediction layers, which an export copies from the source if the model was built without them (`{after}` is the
    number of such a layer in the files); `other_names` are other class names in published config.json files; `parameters` is
    needed for adapters of experts that are one 3-D tensor.
    """

    architecture: str
    model_type: str
    fields: tuple[FieldLike, ...]
    weights: WeightMap
    tiny: Mapping[str, Any]
    ignored: tuple[str, ...] = ()
    passthrough: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()
    parameters: Parameters | None = None

    def native(self, hf: Json, *, ignore: Collection[str] = ()) -> dict[str, Any]:
        """Returns the native config of a config.json. Raises one ConfigError with everything that can't be represented.

        Values are checked before anything is computed from them; fields with invalid keys are skipped. `ignore` names keys that no
        field reads and that would be refused otherwise.
        """
        native, problems = self._read(hf)
        problems += self._refused(hf, ignore)
        if problems:
            raise ConfigError(f"{self.architecture}: " + listed(list(dict.fromkeys(problems))))
        return native

    def sizes(self, hf: Json) -> dict[str, Any]:
        """Returns the native config of a config.json, ignoring keys that no field reads. Doesn't import transformers.

        Raises ConfigError if something that a field reads can't be represented.
        """
        native, problems = self._read(hf)
        if problems:
            raise ConfigError(f"{self.architecture}: " + listed(list(dict.fromkeys(problems))))
        return native

    def _read(self, hf: Json) -> tuple[dict[str, Any], list[str]]:
        """Returns (native config as far as it can be read, problems)."""
        if not OBJECT.allows(hf):
            raise ConfigError(f"a config.json must be an object, not {shown(hf)}.")
        native: dict[str, Any] = {}
        problems, invalid = self._invalid(hf)
        valid = _ValidKeys(hf, invalid)
        for field in self.fields:
            try:
                native |= field.read(valid)
            except _InvalidKey:
                continue  # its problem is listed already
            except ConfigError as error:
                problems.append(str(error))
        problems += [
            f"{name}={shown(native[name])}, which follows from config.json, must be {kind.says}; correct the keys it follows from."
            for name, kind in RANGES.items()
            if native.get(name) is not None and not kind.allows(native[name])
        ]
        try:
            if "quantization_config" not in invalid:
                quantization_of(hf)  # not a part of the native config, but the weights must be readable
        except ConfigError as error:
            problems.append(str(error))
        return native, problems

    @cached_property
    def keys(self) -> frozenset[str]:
        """The keys of config.json that the fields know, and those that every architecture may have."""
        return frozenset(key for key, _ in self._kinds)

    @cached_property
    def _kinds(self) -> tuple[tuple[str, Kind], ...]:
        """Pairs of known keys and their allowed values; a key that several fields read occurs once for each."""
        own = [(key, kind) for field in self.fields for key, kind in field.keys().items()]
        return (*own, *((key, kind) for key, kind in unread_keys.COMMON.items() if key not in dict(own)))

    def unread(self, hf: Json) -> list[str]:
        """Returns the keys of a config.json that nothing reads and that aren't known to be harmless, whatever their values."""
        return unread_keys.unread(hf, self.keys)

    def _invalid(self, hf: Json) -> tuple[list[str], set[str]]:
        """Returns the problems of single values, and their keys."""
        problems = {key: f"{shown(key)} is nested too deeply; remove it." for key in hf if is_deep(hf[key])}
        for key, kind in self._kinds:
            if key not in problems and (problem := kind.problem(hf, key)) is not None:
                problems[key] = problem
        return list(problems.values()), set(problems)

    def _refused(self, hf: Json, ignore: Collection[str]) -> list[str]:
        ignore = {ignore} if isinstance(ignore, str) else set(ignore)
        if read := sorted(self.keys.intersection(ignore)):
            return [f"ignore_keys={', '.join(read)} must name keys that nothing reads; remove them from it."]
        return unread_keys.refused(hf, [key for key in self.unread(hf) if key not in ignore], self.model_type)

    def hf(self, native: Json) -> dict[str, Any]:
        """Returns a config.json that is equivalent to a native config. Raises ConfigError if there is none."""
        out: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for field in self.fields:
            out |= field.write(native)
        return out

    def is_passthrough(self, hf_name: str, dims: Dims) -> bool:
        """Whether the tensor belongs to a multi-token-prediction layer, by the patterns in `passthrough`."""
        after = range(dims.num_layers, dims.num_layers + (dims.hf_mtp_layers or 0))
        return any(fnmatchcase(hf_name, pattern.format(after=number)) for pattern in self.passthrough for number in after)

    def is_ignored(self, hf_name: str) -> bool:
        return any(fnmatchcase(hf_name, pattern) for pattern in self.ignored)


class _InvalidKey(Exception):
    """A field has read a key whose value is invalid."""


class _ValidKeys(Mapping[str, Any]):
    """A view of a config.json that raises _InvalidKey for keys with invalid values."""

    def __init__(self, hf: Json, invalid: Collection[str]) -> None:
        self._hf, self._invalid = hf, invalid

    def __getitem__(self, key: str) -> Any:
        if key in self._invalid:
            raise _InvalidKey(key)
        return self._hf[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hf)

    def __len__(self) -> int:
        return len(self._hf)
