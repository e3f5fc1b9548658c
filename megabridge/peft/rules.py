"""Which adapter tensors feed which native adapter, through which layout: derived from the rule of the weight that is adapted.

A is [r rows of each Hugging Face linear, one linear below another; in], B and the lengths have the rows of the native weight in its
order. So B's layout is the weight's, and A's is one block for each linear.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, override

from megabridge.conversion.native import ADAPTER
from megabridge.errors import ConfigError
from megabridge.mapping import Chosen, Dims, Fuse, Interleave, Joined, Layout, Resolved, Rows, Same, Transpose, WeightMap
from megabridge.peft.lora import LoRA

CHILD: Final = ADAPTER.strip(".")
"""What an adapted module's child is called."""
PREFIX: Final = "base_model.model."
"""Of every name in an adapter's file (PEFT's wrapper)."""
ENDINGS: Final = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "lora_magnitude_vector": ".lora_magnitude_vector"}
"""The native parameters of an adapter, and how a Hugging Face module's name goes on in the file."""
_OUTPUT: Final = "output_layer"


@dataclass(frozen=True)
class Target:
    """The linears behind a native weight. `modules` are those with an adapter, `parts` their places among all `count` that the
    weight is made of; names may have `{row}`, the number of an expert."""

    modules: tuple[str, ...]
    parts: tuple[int, ...]
    count: int
    is_transposed: bool
    layouts: dict[str, Layout]


class AdapterMap(WeightMap):
    """The rules of the adapters that `lora` gives to a model of the rules `base`."""

    def __init__(self, base: WeightMap, lora: LoRA) -> None:
        super().__init__()
        self.base = base
        self.lora = lora
        self._layouts: dict[tuple[Layout, tuple[int, ...]], dict[str, Layout]] = {}  # plans know a layout by its identity

    def linears(self, native: str, dims: Dims) -> tuple[str, ...]:
        """The modules of the Hugging Face linears that the native weight `native` is made of; none where it isn't made of such."""
        found = self.base.resolve(native, dims)
        if (
            found is None
            or found.is_tied_copy
            or not all(name.endswith(".weight") for name in found.hf)
            or not _is_of_matrices(found.layout)
        ):
            return ()
        return tuple(name.removesuffix(".weight") for name in found.hf)

    def target(self, native: str, dims: Dims) -> Target | None:
        """What is adapted of the weight `native`; None for nothing. Raises ConfigError for some experts without the others."""
        modules = self.linears(native, dims)
        parts = tuple(part for part, module in enumerate(modules) if self._is_target(native, module, dims))
        if not parts:
            return None
        found = self.base.resolve(native, dims)
        assert found is not None
        key = (found.layout, parts)
        if key not in self._layouts:
            a, b = _layouts(found.layout, parts, len(modules))
            self._layouts[key] = {"lora_A": a, "lora_B": b, "lora_magnitude_vector": b}
        chosen = tuple(modules[part] for part in parts)
        return Target(chosen, parts, len(modules), _is_transposed(found.layout), self._layouts[key])

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
        if target is None:
            return None
        return Resolved(tuple(PREFIX + name + ENDINGS[kind] for name in target.modules), target.layouts[kind], False)

    @override
    def aliases(self, dims: Dims, tensors: Collection[str]) -> dict[str, str]:
        return {}


def _is_of_matrices(layout: Layout) -> bool:
    """Whether the tensors are matrices, [out, in] or transposed. One of all experts has three dimensions."""
    if isinstance(layout, Rows | Transpose):
        return _is_of_matrices(layout.inner)
    return isinstance(layout, Same | Fuse | Joined | Interleave)


def _is_transposed(layout: Layout) -> bool:
    return isinstance(layout, Transpose) or (isinstance(layout, Rows) and _is_transposed(layout.inner))


def _layouts(layout: Layout, parts: tuple[int, ...], count: int) -> tuple[Layout, Layout]:
    """The layouts of A and of B: neither is transposed, whatever the weight is."""
    if isinstance(layout, Transpose):
        return _layouts(layout.inner, parts, count)
    if isinstance(layout, Rows):
        a, b = _layouts(layout.inner, parts, count)
        return Rows(layout.count, a), Rows(layout.count, b)
    a = Same() if len(parts) == 1 else Fuse(1, (1,) * len(parts))
    return a, layout if len(parts) == count else Chosen(layout, parts)
