"""Freezes parameters by name: they keep their bits and have neither gradient nor optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from megabridge.conversion.parameters import unwrap
from megabridge.conversion.plan import LocalItem, PlannedParameter
from megabridge.errors import ConfigError, listed
from megabridge.parallel.collectives import all_gather

if TYPE_CHECKING:
    from megabridge.bridge.auto_bridge import AutoBridge

Chunks = list[torch.nn.Module]


def freeze(chunks: Chunks, *, bridge: AutoBridge, patterns: Sequence[str]) -> Chunks:
    """A pre-wrap hook: sets requires_grad=False on the parameters that `patterns` name. Every rank calls it.

    A pattern is compared with a parameter's native name (global layer numbers) and with the Hugging Face names of the tensors that
    it is made of. Raises ConfigError on every rank where a pattern matches nothing, where only a part of a parameter would be
    frozen (Megatron fuses q, k and v into one), or where nothing is left to train.
    """
    items = bridge.plan(chunks).items
    frozen, here = choose(items, patterns)
    check(patterns, all_gather(here))
    freeze_parameters(chunks, [item.local.parameter for item in items if item.record.name in frozen])
    return chunks


@dataclass(frozen=True)
class Found:
    """Result of patterns on a part of a model: those that match something, problems, and whether anything is trained."""

    used: frozenset[str]
    problems: tuple[str, ...]
    has_trained: bool


def choose(entries: Sequence[PlannedParameter], patterns: Sequence[str]) -> tuple[set[str], Found]:
    """Returns the native names of the parameters that `patterns` freeze, and the argument of `check`. No communication."""
    frozen, problems = set(), []
    for entry in entries:
        names = frozen_part(entry, patterns)
        if len(names) == len(entry.hf):
            frozen.add(entry.record.name)
        elif names:
            others = [name for name in entry.hf if name not in names]
            problems.append(
                f"{entry.record.name} is one parameter of {names[0]} and {others[0]}, so both are frozen or neither; name both"
            )
    used = {pattern for pattern in patterns for entry in entries if _fits(pattern, [entry.record.name, *entry.hf])}
    return frozen, Found(frozenset(used), tuple(problems), len(frozen) < len(entries))


def check(patterns: Sequence[str], everywhere: Iterable[Found]) -> None:
    """Raises ConfigError for `patterns` that can't be right for the whole model; `everywhere` has the results of all its parts."""
    parts = list(everywhere)
    unused = set(patterns).difference(*(part.used for part in parts))
    problems = sorted({problem for part in parts for problem in part.problems})
    problems += [
        f"{pattern!r} matches no Hugging Face and no native name; look them up with recipe=plan" for pattern in sorted(unused)
    ]
    if not problems and not any(part.has_trained for part in parts):
        problems.append("nothing is left to train; remove a pattern, or add one that begins with !")
    if problems:
        raise ConfigError(f"optimizer.freeze={list(patterns)}: " + listed(problems))


def freeze_parameters(chunks: Iterable[Any], parameters: Iterable[torch.Tensor]) -> None:
    """Sets requires_grad=False on `parameters`, which belong to `chunks`. No communication."""
    for parameter in parameters:
        if isinstance(parameter, torch.nn.Parameter):  # not a router's correction bias, a buffer
            parameter.requires_grad_(False)
    for chunk in chunks:
        model: Any = unwrap(chunk)
        model.enable_input_require_grads()


def frozen_names(items: Iterable[LocalItem]) -> set[str]:
    """Native names of the parameters that no rank trains. Every rank calls it; names are exchanged once."""
    here = {item.record.name for item in items if not item.local.parameter.requires_grad}
    return set().union(*all_gather(here))


def frozen_part(entry: PlannedParameter, patterns: Sequence[str]) -> list[str]:
    """The Hugging Face tensors of a parameter that are to be frozen: the last pattern that matches decides."""
    is_frozen = dict.fromkeys(entry.hf, False)
    for pattern in patterns:
        fits_all = _fits(pattern, [entry.record.name])
        for name in entry.hf:
            if fits_all or _fits(pattern, [name]):
                is_frozen[name] = not pattern.startswith("!")
    return [name for name, frozen in is_frozen.items() if frozen]


def _fits(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern.removeprefix("!")) for name in names)
