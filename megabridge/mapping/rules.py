"""Rules: which Hugging Face tensors make up which native parameter, through which layout. One table for both directions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from megabridge.errors import MappingError
from megabridge.mapping.dims import Dims
from megabridge.mapping.layout import Layout, Same

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # a whole name component that stands for a layer
_EXPERT = re.compile(r"(?<=\.experts)\.\d+(?=\.)")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
SAME: Final = Same()


@dataclass(frozen=True)
class Rule:
    """The rule of one parameter: `native` are its names under different backends, `hf` the tensors that make it up, in order.

    `when_tied` is the tensor that fills it instead if embedding and output weights are tied.
    """

    native: tuple[str, ...]
    hf: tuple[str, ...]
    layout: Layout = SAME
    when_tied: str | None = None

    def under(self, native: str, hf: str) -> Rule:
        """Returns the same rule below two prefixes."""
        return replace(self, native=tuple(f"{native}.{name}" for name in self.native), hf=tuple(f"{hf}.{name}" for name in self.hf))


Rules = tuple[Rule, ...]


def weight(native: str | tuple[str, ...], *hf: str, layout: Layout = SAME, when_tied: str | None = None) -> Rule:
    """Makes the rule of one native parameter; a tuple has its names under different backends."""
    return Rule((native,) if isinstance(native, str) else native, hf, layout, when_tied)


def block(native: str, hf: str, *rules: Rule | Rules) -> Rules:
    """Puts rules below a prefix on each side, such as that of a layer."""
    return tuple(rule.under(native, hf) for rule in flat(rules))


def flat(rules: Iterable[Rule | Rules]) -> Iterator[Rule]:
    for entry in rules:
        if isinstance(entry, Rule):
            yield entry
        else:
            yield from entry


@dataclass(frozen=True, slots=True)
class Resolved:
    """A rule applied to one native parameter. Names with `{row}` stand for as many tensors as the layout has parts: all names with
    row 0, then all with row 1, and so on."""

    hf: tuple[str, ...]
    layout: Layout
    is_tied_copy: bool

    def names(self, count: int) -> tuple[str, ...]:
        """Returns the names of the `count` tensors."""
        if "{row}" not in self.hf[0]:
            return self.hf
        return tuple(name.format(row=row) for row in range(count // len(self.hf)) for name in self.hf)


class _Numbers(dict[str, str]):
    """Fills in placeholders; one that the native name lacks stands for the parameter's rows (`{head}`, `{expert}`)."""

    def __missing__(self, key: str) -> str:
        return "{row}"


class WeightMap:
    """A family's weight rules, looked up by canonical native name (global layer numbers).

    One expert's parameter, `experts.3.linear_fc1.weight`, is a row of `experts.linear_fc1.weight`, for which there is a rule.
    `{mtp}` in a native name is the number of a multi-token-prediction layer; files continue the numbers of the other layers:
    `{after}`. `copies` pairs tensors of such a layer with the tensors that they must equal bit for bit.
    """

    def __init__(self, *rules: Rule | Rules, copies: tuple[tuple[str, str], ...] = ()) -> None:
        self.rules: Rules = tuple(flat(rules))
        self.copies = copies
        self._by_template: dict[str, tuple[Rule, tuple[str, ...]]] = {}
        for rule in self.rules:
            for name in rule.native:
                template = _PLACEHOLDER.sub("#", name)
                if template in self._by_template:
                    raise MappingError(f"two rules map the native parameter {name!r}; keep one.")
                self._by_template[template] = (rule, tuple(_PLACEHOLDER.findall(name)))

    def resolve(self, native: str, dims: Dims) -> Resolved | None:
        """Returns the tensors and the layout of the parameter `native`, or None if it has no rule."""
        native = _EXPERT.sub("", native)
        found = self._by_template.get(_NUMBER.sub("#", native))
        if found is None:
            return None
        rule, placeholders = found
        numbers = _Numbers(zip(placeholders, _NUMBER.findall(native), strict=True))
        if "mtp" in numbers:
            numbers["after"] = str(dims.num_layers + int(numbers["mtp"]))
        if dims.tied and rule.when_tied is not None:
            return Resolved((rule.when_tied.format_map(numbers),), rule.layout, True)
        return Resolved(tuple(name.format_map(numbers) for name in rule.hf), rule.layout, False)

    def aliases(self, dims: Dims, tensors: Collection[str]) -> dict[str, str]:
        """Returns copies that files may hold besides `tensors`, each with the one of `tensors` that it must equal bit for bit.

        They are copies of tied embeddings, and those in multi-token-prediction layers that are among `tensors`.
        """
        tied = {rule.hf[0]: rule.when_tied for rule in self.rules if rule.when_tied is not None} if dims.tied else {}
        out = {copy: original for copy, original in tied.items() if original in tensors}
        for number in range(dims.num_layers, dims.num_layers + (dims.hf_mtp_layers or 0)):
            for copy, original in self.copies:
                layer = copy.partition("{after}")[0] + f"{number}."
                if any(name.startswith(layer) for name in tensors):
                    out[copy.format(after=number)] = tied.get(original, original)
        return out


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))
