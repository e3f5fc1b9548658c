"""Captures inputs and outputs of modules during one forward pass by hooks, in transformers and in Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabridge.conformance.pairing import LOGITS, ModulePair, ParityPoint
from megabridge.conformance.tiny_model import quiet
from megabridge.conversion.parity import load_hf
from megabridge.models.logits import gather_logits


@dataclass(frozen=True)
class Event:
    """A tensor captured at a point of transformers' model; events are in the order of execution.

    `parent` is the module whose code calls the point's module; `same_as` is the number of an earlier event with the same tensor.
    """

    point: ParityPoint
    value: Tensor
    parent: str
    same_as: int | None


def run_hf(folder: Path, modules: Iterable[str], tokens: Tensor, dtype: str, file: Path) -> None:
    """Runs transformers' model in `folder` on `tokens` [1, s] and writes the events at `modules` to `file`. One rank calls it."""
    quiet()
    model = load_hf(folder, dtype)
    known = dict(model.named_modules())
    events: list[dict[str, Any]] = []
    kept: list[Tensor] = []  # keeps the tensors alive, so that no address is reused

    def see(name: str, side: str, parent: str, value: Any) -> None:
        tensor = first_tensor(value)
        if tensor is None or any(event["module"] == name and event["side"] == side for event in events):
            return
        same = [number for number, other in enumerate(kept) if _is_same(other, tensor)]
        kept.append(tensor)
        events.append(
            {
                "module": name,
                "side": side,
                "parent": parent,
                "same_as": same[-1] if same else -1,
                "value": tensor.detach().float().clone(),
            }
        )

    for name in modules:
        found = in_memory(model, name)
        module = known.get(found)
        if module is not None:
            parent = _caller(known, found)
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name, parent=parent: see(name, "input", parent, (args, kwargs)), with_kwargs=True
            )
            module.register_forward_hook(lambda _, args, output, name=name, parent=parent: see(name, "output", parent, output))
    with torch.no_grad():
        see(LOGITS, "output", "", model(tokens).logits)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(events, file)


def read_events(file: Path) -> list[Event]:
    """Reads the events from a file written by `run_hf`."""
    content = torch.load(file, weights_only=True, mmap=True)
    return [
        Event(ParityPoint(e["module"], e["side"]), e["value"], e["parent"], e["same_as"] if e["same_as"] >= 0 else None)
        for e in content
    ]


def in_memory(model: Any, module: str) -> str:
    """Returns the name in transformers' model of a module that files call `module` (transformers/core_model_loading.py)."""
    from transformers.core_model_loading import WeightRenaming

    renamings = [entry for entry in model._weight_conversions or () if isinstance(entry, WeightRenaming)]
    tensor = f"{module}.weight"
    for renaming in renamings:
        tensor, _ = renaming.rename_source_key(tensor)
    return tensor.removesuffix(".weight")


def first_tensor(value: Any) -> Tensor | None:
    """Returns the first floating-point tensor in nested tuples, lists and dicts, or None."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _caller(known: Mapping[str, torch.nn.Module], name: str) -> str:
    """Returns the name of the module that calls the module `name`: the closest parent that isn't a ModuleList."""
    parent = name.rpartition(".")[0]
    while isinstance(known.get(parent), torch.nn.ModuleList):
        parent = parent.rpartition(".")[0]
    return parent


@contextmanager
def _hooked(pairs: Sequence[ModulePair], seen: dict[tuple[int, str], list[Tensor]]) -> Iterator[None]:
    """Fills `seen` by (module's id, side); an output has two entries, before and after the model's own hooks on the module."""
    handles = []

    def keep(key: tuple[int, str], value: Any, most: int) -> None:
        tensor = first_tensor(value)
        held = seen.setdefault(key, [])
        if tensor is not None and len(held) < most:
            held.append(tensor.detach().float().cpu().clone())

    wanted = {(id(pair.module), pair.point.side): pair.module for pair in pairs}
    for key, module in wanted.items():
        if key[1] == "input":
            handles.append(
                module.register_forward_pre_hook(lambda _, args, kwargs, key=key: keep(key, (args, kwargs), 1), with_kwargs=True)
            )
        else:
            for most, early in ((1, True), (2, False)):
                hook = partial(_on_output, keep, key, most)
                handles.append(module.register_forward_hook(hook, prepend=early))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_output(keep: Any, key: tuple[int, str], most: int, module: torch.nn.Module, args: Any, output: Any) -> None:
    """Keeps an output; megatron-core's linears return (output, bias to be added later), which are added here."""
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Tensor) and output[1].dim() == 1:
        output = output[0] + output[1]
    keep(key, output, most)


def run_native(
    chunks: Sequence[torch.nn.Module], pairs: Sequence[ModulePair], tokens: Tensor
) -> dict[tuple[int, str], list[Tensor]]:
    """Returns inputs and outputs of the native modules of `pairs` for `tokens` [1, s], by (module's id, side). Collective."""
    seen: dict[tuple[int, str], list[Tensor]] = {}
    with _hooked(pairs, seen):
        gather_logits(chunks, tokens)
    return seen
