"""Family: everything that is known about one Hugging Face architecture, as data."""

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
    """What PEFT goes by where one 3-D tensor holds all experts of a layer, which is a parameter of transformers' model.

    `is_transposed` is what transformers' class of the experts says of itself; `names` are pairs of a name's end in files and in the
    model where they differ.
    """

    is_transposed: bool
    names: tuple[tuple[str, str], ...] = ()

    def name(self, tensor: str) -> str:
        """The parameter's name in transformers' model of the file's `tensor`."""
        for end, other in self.names:
            if tensor.endswith(end):
                return tensor.removesuffix(end) + other
        return tensor


@dataclass(frozen=True)
class Family:
    """One architecture.

    `architecture` is the Hugging Face class name and `model_type` its config's; `tiny` is a small config.json that still
    exercises every rule; `ignored` are name patterns of tensors that files may hold and that no parameter needs; `carried` those
    of multi-token-prediction layers, which come back with an export of a model that was built without them (`{after}` is such a
    layer's number in the files); `other_names` are class names of the architecture's own that its published config.json gives;
    `parameters` is needed for adapters of experts that are one 3-D tensor.
    """

    architecture: str
    model_type: str
    fields: tuple[FieldLike, ...]
    weights: WeightMap
    tiny: Mapping[str, Any]
    ignored: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()
    parameters: Parameters | None = None

    def native(self, hf: Json, *, ignore: Collection[str] = ()) -> dict[str, Any]:
        """The native config of a config.json. Raises one ConfigError with everything that can't be represented.

        Values are checked before anything is computed with them; a field whose keys are unfit is left out then. `ignore` names keys
        that no field reads and that would be refused.
        """
        native, problems = self._read(hf)
        problems += self._refused(hf, ignore)
        if problems:
            raise ConfigError(f"{self.architecture}: " + listed(list(dict.fromkeys(problems))))
        return native

    def sizes(self, hf: Json) -> dict[str, Any]:
        """The native config of a config.json, whatever keys it has that no field reads. Imports nothing.

        Raises ConfigError where something that a field reads can't be represented.
        """
        native, problems = self._read(hf)
        if problems:
            raise ConfigError(f"{self.architecture}: " + listed(list(dict.fromkeys(problems))))
        return native

    def _read(self, hf: Json) -> tuple[dict[str, Any], list[str]]:
        """(what can be read, what can't be represented)"""
        if not OBJECT.allows(hf):
            raise ConfigError(f"a config.json must be an object, not {shown(hf)}.")
        native: dict[str, Any] = {}
        problems, unfit = self._unfit(hf)
        sound = _Sound(hf, unfit)
        for field in self.fields:
            try:
                native |= field.read(sound)
            except _UnfitKey:
                continue  # its problem is among the others
            except ConfigError as error:
                problems.append(str(error))
        problems += [
            f"{name}={shown(native[name])}, which follows from config.json, must be {kind.says}; correct what it follows from."
            for name, kind in RANGES.items()
            if native.get(name) is not None and not kind.allows(native[name])
        ]
        try:
            if "quantization_config" not in unfit:
                quantization_of(hf)  # `native` describes the model, whatever its weights are stored as; but they must be readable
        except ConfigError as error:
            problems.append(str(error))
        return native, problems

    @cached_property
    def keys(self) -> frozenset[str]:
        """The keys of config.json that the fields account for, and those that every architecture may have."""
        return frozenset(key for key, _ in self._kinds)

    @cached_property
    def _kinds(self) -> tuple[tuple[str, Kind], ...]:
        """What every key that is accounted for may hold; one that several fields read stands there for each."""
        own = [(key, kind) for field in self.fields for key, kind in field.keys().items()]
        return (*own, *((key, kind) for key, kind in unread_keys.COMMON.items() if key not in dict(own)))

    def unread(self, hf: Json) -> list[str]:
        """The keys of a config.json that nothing reads and that aren't known to be harmless, whatever they hold."""
        return unread_keys.unread(hf, self.keys)

    def _unfit(self, hf: Json) -> tuple[list[str], set[str]]:
        """What is wrong with single values, and the keys that have them."""
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
        """A config.json equal in meaning to a native config."""
        out: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for field in self.fields:
            out |= field.write(native)
        return out

    def is_carried(self, hf_name: str, dims: Dims) -> bool:
        """Whether the tensor belongs to a multi-token-prediction layer."""
        after = range(dims.num_layers, dims.num_layers + (dims.hf_mtp_layers or 0))
        return any(fnmatchcase(hf_name, pattern.format(after=number)) for pattern in self.carried for number in after)

    def is_ignored(self, hf_name: str) -> bool:
        return any(fnmatchcase(hf_name, pattern) for pattern in self.ignored)


class _UnfitKey(Exception):
    """A field asked for a key whose value is unfit."""


class _Sound(Mapping[str, Any]):
    """A config.json of which unfit values can't be read."""

    def __init__(self, hf: Json, unfit: Collection[str]) -> None:
        self._hf, self._unfit = hf, unfit

    def __getitem__(self, key: str) -> Any:
        if key in self._unfit:
            raise _UnfitKey(key)
        return self._hf[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hf)

    def __len__(self) -> int:
        return len(self._hf)
