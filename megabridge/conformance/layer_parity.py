"""Compares a Megatron model with transformers' module by module, in the order in which transformers computes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config.schema import Config
from megabridge.conformance.capture import Event, read_events, run_hf, run_native
from megabridge.conformance.pairing import LOGITS, ModulePair, ParityPoint, pairs, points_of
from megabridge.conversion.plan import Plan
from megabridge.hf import resolve
from megabridge.parallel import collectives

from megatron.core import parallel_state

TOLERANCES: Final = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
"""Largest difference of a value by dtype, relative to the largest value at the same point."""


@dataclass(frozen=True)
class ParityRow:
    """One compared point: `difference` is the largest over all ranks, relative to the largest value there, which is `scale`."""

    event: int
    point: ParityPoint
    native: str
    difference: float
    scale: float


@dataclass(frozen=True)
class Fault:
    """The first point above the tolerance, and the module of transformers whose computation differs."""

    module: str
    why: str
    row: ParityRow


@dataclass(frozen=True)
class Comparison:
    """All points that were compared, in transformers' order, and the modules that were not."""

    rows: tuple[ParityRow, ...]
    not_compared: tuple[str, ...]
    fault: Fault | None

    def lines(self, worst: int = 6) -> list[str]:
        """Returns a report for people: figures of the worst points, what was not compared, the verdict."""
        bad = sorted(self.rows, key=lambda row: -row.difference if row.difference == row.difference else float("-inf"))[:worst]
        lines = [f"{len(self.rows)} inputs and outputs compared; the largest differences, relative to the largest value there:"]
        lines += [f"  {_shown(row.point)} and native {row.native}: {row.difference:.1e} of {row.scale:.3g}" for row in bad]
        if self.not_compared:
            lines.append(f"not compared: {', '.join(self.not_compared)}")
        if self.fault is None:
            lines.append("no module differs")
        else:
            lines.append(f"first difference: {self.fault.module}: {self.fault.why}")
        return lines


def tokens_for(native: Mapping[str, Any], *, length: int, tp: int, seed: int) -> Tensor:
    """Returns random tokens [1, s]; s is about `length`, a multiple of tp, and differs from the numbers of heads.

    Otherwise shapes couldn't tell the dimensions of sequence and heads apart.
    """
    heads = {native["num_attention_heads"], native["num_query_groups"], 1}
    length = min(length, int(native["seq_length"])) // tp * tp
    while length in heads and length > tp:
        length -= tp
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, native["vocab_size"], (1, length), generator=generator)


def compare_model(config: Config, bridge: AutoBridge, chunks: Sequence[torch.nn.Module], file: Path) -> Comparison:
    """Compares a model with transformers' model of the bridge's source, with the settings in `config`. Collective."""
    tokens = tokens_for(bridge.source.native, length=config.recipe.seq_length, tp=config.parallel.tp, seed=config.seed)
    folder = resolve.resolve(str(bridge.source.location), revision=bridge.source.revision)
    tolerance = float(config.recipe.options.get("tolerance", TOLERANCES[config.model.dtype]))
    return compare_folder(
        bridge.plan(chunks), chunks, folder, tokens=tokens, dtype=config.model.dtype, tolerance=tolerance, file=file
    )


def compare_folder(
    plan: Plan, chunks: Sequence[torch.nn.Module], folder: Path, *, tokens: Tensor, dtype: str, tolerance: float, file: Path
) -> Comparison:
    """Runs `tokens` [1, s] through transformers' model of `folder`, on rank 0, and through `chunks`. Collective.

    The events of transformers' modules are written to `file`, which all ranks must be able to read.
    """
    collectives.on_rank_zero("running transformers", lambda: run_hf(folder, points_of(plan), tokens, dtype, file))
    events, matched = read_events(file), pairs(plan, chunks)
    seen = run_native(chunks, matched, tokens)
    return compare(events, matched, seen, tokens=tokens, tolerance=tolerance)


def compare(
    events: Sequence[Event],
    matched: Sequence[ModulePair],
    seen: Mapping[tuple[int, str], list[Tensor]],
    *,
    tokens: Tensor,
    tolerance: float,
) -> Comparison:
    """Compares the tensors captured on both sides. Collective: every rank gets the same answer."""
    by_point = {event.point: number for number, event in enumerate(events)}
    own: dict[int, tuple[str, float, float]] = {}
    for pair in matched:
        number = by_point.get(pair.point)
        held = seen.get((id(pair.module), pair.point.side))
        if number is None or not held:
            continue
        difference = min((_difference(pair, value, events[number].value, tokens.shape[1]) for value in held), key=_badness)
        if difference is not None:
            known = own.get(number)
            if known is None or not difference <= known[1]:
                own[number] = (pair.native, difference, float(events[number].value.abs().max()))
    merged: dict[int, tuple[str, float, float]] = {}
    for theirs in collectives.all_gather(own):
        for number, entry in theirs.items():
            if number not in merged or not entry[1] <= merged[number][1]:
                merged[number] = entry
    rows = tuple(ParityRow(number, events[number].point, *merged[number]) for number in sorted(merged))
    left = [event.point.module for event in events if event.point not in {row.point for row in rows}]
    missing = dict.fromkeys(_numberless(name) for name in left if name != LOGITS)
    return Comparison(rows, tuple(missing), find_fault(rows, events, tolerance))


def find_fault(rows: Sequence[ParityRow], events: Sequence[Event], tolerance: float) -> Fault | None:
    """Returns the first row above the tolerance, with the module that causes it; None if there is none."""
    bad = next((row for row in rows if not row.difference <= tolerance), None)
    if bad is None:
        return None
    event, figure = events[bad.event], f"differ by {bad.difference:.1e} of the largest (native {bad.native})"
    if event.point.module == LOGITS:
        return Fault(
            "logits", f"the logits {figure}, and nothing before them: the output layer, or what is done to its output", bad
        )
    if event.point.side == "output":
        return Fault(event.point.module, f"its outputs {figure}, its inputs don't", bad)
    good = {row.event for row in rows if row.difference <= tolerance}
    if event.same_as is not None and event.same_as in good:
        source = _shown(events[event.same_as].point)
        return Fault(event.point.module, f"its inputs {figure}: they must be {source}, which doesn't differ", bad)
    return Fault(event.parent or "the model", f"what it computes before {event.point.module} {figure}", bad)


def _badness(difference: float | None) -> float:
    return float("inf") if difference is None or difference != difference else difference


def _difference(pair: ModulePair, ours: Tensor, theirs: Tensor, length: int) -> float | None:
    """Returns the largest difference relative to the largest value of theirs; None where the shapes can't be compared."""
    rows, whole = _rows(ours, length), _rows(theirs, length)
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    if rows.shape[0] * size == whole.shape[0] and size > 1:  # cut along the sequence
        whole = whole[rank * rows.shape[0] : (rank + 1) * rows.shape[0]]
    if rows.shape[0] != whole.shape[0]:
        return None
    if pair.ours is not None and pair.theirs is not None:
        rows, whole = rows[:, pair.ours], whole[:, pair.theirs]
    else:
        number, count = pair.part
        own, theirs_width = rows.shape[1], whole.shape[1]
        total = theirs_width * count
        if own < total and own * size % total:
            return None
        first = rank // (own * size // total) * own if own < total else 0  # several ranks may hold the same heads
        low = number * theirs_width
        begin, end = max(low, first), min(low + theirs_width, first + own)
        if begin >= end:
            return None
        rows, whole = rows[:, begin - first : end - first], whole[:, begin - low : end - low]
    if rows.numel() == 0:
        return None
    return float((rows - whole).abs().max() / theirs.abs().max().clamp(min=1e-30))


def _rows(tensor: Tensor, length: int) -> Tensor:
    """Returns one sequence as [tokens, features], whatever the order of batch (1), sequence and heads."""
    if tensor.dim() > 2:
        tensor = tensor[0] if tensor.shape[0] == 1 else tensor[:, 0]
        if tensor.dim() > 2 and tensor.shape[0] != length and tensor.shape[1] == length:
            tensor = tensor.transpose(0, 1)
    return tensor.reshape(tensor.shape[0], -1)


def _shown(point: ParityPoint) -> str:
    return "the logits" if point.module == LOGITS else f"the {point.side} of {point.module}"


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name)
