"""Conversion rules of adapters, derived from the rules of the weights that they adapt.

A is [r rows of each Hugging Face linear, concatenated; in]. B and the magnitudes have the rows of the native weight, in its order.
So B has the layout of the weight, and A has one block for each linear.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, override

from megabridge.conversion.parameters import ADAPTER
from megabridge.errors import ConfigError
from megabridge.families import Family
from megabridge.mapping import (
    ConcatRows,
    Dims,
    Fuse,
    FusedSource,
    Interleave,
    InterleaveColumns,
    Layout,
    PerRow,
    Resolved,
    Same,
    Select,
    Stack,
    Transpose,
    WeightMap,
)
from megabridge.peft.lora_config import LoRA, is_named

CHILD: Final = ADAPTER.strip(".")
"""Name of the adapter among an adapted module's children."""
PREFIX: Final = "base_model.model."
"""Prefix of every name in an adapter's file (PEFT's wrapper)."""
ENDINGS: Final = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "lora_magnitude_vector": ".lora_magnitude_vector"}
"""Suffix of a Hugging Face module's name in the file, by native parameter of an adapter."""
_OUTPUT: Final = "output_layer"
_BOTH: Final = ("linear_fc1", "linear_fc2")  # in the order of transformers' classes
_PLACEHOLDER: Final = re.compile(r"\{\w+\}")


@dataclass(frozen=True)
class AdapterTarget:
    """The adapted part of a native weight: the linears at `parts` of the `count` that it is made of, or the 3-D `parameter` of all
    experts. `tensors` and `layouts` are by native parameter of the adapter; names may contain `{row}`, the number of an expert.
    """

    parts: tuple[int, ...]
    count: int
    is_transposed: bool
    tensors: Mapping[str, tuple[str, ...]]
    layouts: dict[str, Layout]
    parameter: str | None = None


class AdapterMap(WeightMap):
    """The rules of the adapters that `lora` gives to a model of `family`."""

    def __init__(self, family: Family, lora: LoRA) -> None:
        super().__init__()
        self.family = family
        self.base = family.weights
        self.lora = lora
        self._layouts: dict[tuple[Layout, tuple[int, ...]], dict[str, Layout]] = {}  # plans compare layouts by identity

    def linears(self, native: str, dims: Dims) -> tuple[str, ...]:
        """Names of the Hugging Face linears that the native weight `native` is made of; empty if it isn't made of linears."""
        found = self.base.resolve(native, dims)
        if (
            found is None
            or found.is_tied_copy
            or not all(name.endswith(".weight") for name in found.hf)
            or not _is_of_matrices(found.layout)
        ):
            return ()
        return tuple(name.removesuffix(".weight") for name in found.hf)

    def parameter(self, native: str, dims: Dims) -> str | None:
        """Name of the 3-D parameter of all experts in transformers' model that the weight `native` is converted from; or None.

        Raises ConfigError where `lora` has target_parameters and the family doesn't describe its parameters for PEFT.
        """
        found = self.base.resolve(native, dims)
        if found is None or not isinstance(found.layout, Stack):
            return None
        if self.family.parameters is None and self.lora.target_parameters:
            raise ConfigError(
                f"the family of {self.family.architecture} must say how PEFT sees {found.hf[0]} to give it an adapter; set "
                "Family(parameters=...), or leave target_parameters out."
            )
        return found.hf[0] if self.family.parameters is None else self.family.parameters.name(found.hf[0])

    def target(self, native: str, dims: Dims) -> AdapterTarget | None:
        """Returns what is adapted of the weight `native`, or None. Raises ConfigError if only some of the experts are targets."""
        found, parameter = self.base.resolve(native, dims), self.parameter(native, dims)
        if parameter is not None:
            return self._stacked(native, parameter, dims) if is_named(parameter, self.lora.target_parameters) else None
        modules = self.linears(native, dims)
        parts = tuple(part for part, module in enumerate(modules) if self._is_target(native, module, dims))
        if not parts:
            return None
        assert found is not None
        key = (found.layout, parts)
        if key not in self._layouts:
            a, b = _layouts(found.layout, parts, len(modules))
            self._layouts[key] = {"lora_A": a, "lora_B": b, "lora_magnitude_vector": b}
        tensors = {kind: tuple(PREFIX + modules[part] + ending for part in parts) for kind, ending in ENDINGS.items()}
        return AdapterTarget(parts, len(modules), _is_transposed(found.layout), tensors, self._layouts[key])

    def _stacked(self, native: str, parameter: str, dims: Dims) -> AdapterTarget:
        """PEFT concatenates the A of all experts by rows, and interleaves the columns of their B.

        PEFT's A applies to the parameter's last dimension, or to the one before if the class says `is_transposed`. Llama 4's class
        doesn't although its weights are [in, out], so that A and B change places.
        """
        found = self.base.resolve(native, dims)
        assert found is not None and isinstance(found.layout, Stack) and self.family.parameters is not None
        count, inner = found.layout.count, found.layout.inner
        is_exchanged = isinstance(inner, Transpose) and not self.family.parameters.is_transposed
        key = (found.layout, (0,))
        if key not in self._layouts:
            b = inner.inner if isinstance(inner, Transpose) else inner
            a, b = (
                (InterleaveColumns(count, Transpose()), ConcatRows(count, Transpose(b)))
                if is_exchanged
                else (ConcatRows(count), InterleaveColumns(count, b))
            )
            self._layouts[key] = {"lora_A": a, "lora_B": b}
        module = self._wrapper(native, parameter, dims)
        theirs = {"lora_A": "lora_B", "lora_B": "lora_A"} if is_exchanged else {"lora_A": "lora_A", "lora_B": "lora_B"}
        tensors = {ours: (PREFIX + module + ENDINGS[name],) for ours, name in theirs.items()}
        return AdapterTarget((0,), 1, False, tensors, self._layouts[key], parameter)

    def _wrapper(self, native: str, parameter: str, dims: Dims) -> str:
        """Name of PEFT's wrapper: if two parameters of a module have adapters, the second's wrapper contains the first's."""
        module = parameter.rpartition(".")[0]
        second = self.parameter(native.replace(*_BOTH), dims) if _BOTH[0] in native else None
        return f"{module}.base_layer" if second is not None and is_named(second, self.lora.target_parameters) else module

    def is_wrapper(self, module: str) -> bool:
        """Whether `module` is the name of PEFT's wrapper of a 3-D parameter of this family."""
        parameters = self.family.parameters
        names = [
            parameters.name(rule.hf[0])
            for rule in self.base.rules
            if parameters is not None and isinstance(rule.layout, Stack) and rule.native[0].endswith(".weight")
        ]
        patterns = {_PLACEHOLDER.sub("*", name.rpartition(".")[0]) for name in names}
        return any(fnmatchcase(module.removesuffix(".base_layer"), pattern) for pattern in patterns)

    def _is_target(self, native: str, module: str, dims: Dims) -> bool:
        names = [module.format(row=row) for row in range(dims.size("num_moe_experts"))] if "{row}" in module else [module]
        verdicts = {self.lora.is_target(name, is_output=native.startswith(_OUTPUT)) for name in names}
        if len(verdicts) > 1:
            raise ConfigError(f"all experts of {native} must have adapters or none; name {module.format(row='*')} instead.")
        return verdicts.pop()

    @override
    def resolve(self, native: str, dims: Dims) -> Resolved | None:
        head, _, kind = native.rpartition(ADAPTER)
        target = self.target(f"{head}.weight", dims) if head and kind in ENDINGS else None
        return None if target is None else Resolved(target.tensors[kind], target.layouts[kind], False)

    @override
    def aliases(self, dims: Dims, tensors: Collection[str]) -> dict[str, str]:
        return {}


def _is_of_matrices(layout: Layout) -> bool:
    """Whether the tensors of a layout are matrices of linears, [out, in] or transposed."""
    if isinstance(layout, PerRow | Transpose):
        return _is_of_matrices(layout.inner)
    return isinstance(layout, Same | Fuse | FusedSource | Interleave)


def _is_transposed(layout: Layout) -> bool:
    return isinstance(layout, Transpose) or (isinstance(layout, PerRow) and _is_transposed(layout.inner))


def _layouts(layout: Layout, parts: tuple[int, ...], count: int) -> tuple[Layout, Layout]:
    """The layouts of A and of B, neither of which is transposed even if the weight is."""
    if isinstance(layout, Transpose):
        return _layouts(layout.inner, parts, count)
    if isinstance(layout, PerRow):
        a, b = _layouts(layout.inner, parts, count)
        return PerRow(layout.count, a), PerRow(layout.count, b)
    a = Same() if len(parts) == 1 else Fuse(1, (1,) * len(parts))
    return a, layout if len(parts) == count else Select(layout, parts)
