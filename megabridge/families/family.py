"""Family: everything that is known about one Hugging Face architecture, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from megabridge.errors import ConfigError, listed
from megabridge.families.fields import COMPUTING, INERT, FieldLike, Json
from megabridge.families.quantization import quantization_of
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

    def native(self, hf: Json) -> dict[str, Any]:
        """The native config of a config.json. Raises one ConfigError with every key that can't be represented."""
        native: dict[str, Any] = {}
        problems: list[str] = []
        known = INERT.union(*(field.keys() for field in self.fields))
        for field in self.fields:
            try:
                native |= field.read(hf)
            except ConfigError as error:
                problems.append(str(error))
        for key in sorted(hf.keys() - known):
            if key in COMPUTING and hf[key]:
                problems.append(f"{key}={hf[key]!r} can't be represented; unset it or use an architecture that has it.")
        try:
            quantization_of(hf)  # `native` describes the model, whatever its weights are stored as; but they must be readable
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError(f"{self.architecture}: " + listed(problems))
        return native

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
