"""What the ranks of tests/training/test_optimizer.py run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megabridge.config.schema import OptimizerConfig, SchedulerConfig
from megabridge.native import checkpoint
from megabridge.training import build_optimizer
from megabridge.training.step import forward_backward, prepare
from tests.support import tiny

from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging


def build(optimizer: dict[str, Any], scheduler: dict[str, Any], steps: int = 10) -> None:
    """Builds them for a model with the distributed optimizer."""
    build_optimizer(tiny.model(), OptimizerConfig(**optimizer), SchedulerConfig(**scheduler), steps=steps)


def rates(schedules: list[dict[str, Any]], steps: int) -> list[list[float]]:
    """The learning rate of each step, peak 1, for each schedule."""
    chunks = tiny.model()
    found = []
    for settings in schedules:
        optimizer, scheduler = build_optimizer(chunks, OptimizerConfig(lr=1.0), SchedulerConfig(**settings), steps=steps)
        taken = []
        for _ in range(steps):
            taken.append(float(get_canonical_lr_for_logging(optimizer.param_groups) or 0.0))
            scheduler.step(1)
        found.append(taken)
    return found


def decay(**settings: Any) -> tuple[list[str], list[str]]:
    """Names of the parameters of this rank that are decayed, and of those that are not."""
    chunks = tiny.model(add_qkv_bias=True)
    config = OptimizerConfig(weight_decay=0.1, distributed=True, **settings)
    optimizer, _ = build_optimizer(chunks, config, SchedulerConfig(), steps=10)
    (part,) = optimizer.chained_optimizers
    names = {parameter: name for chunk in chunks for name, parameter in chunk.named_parameters()}
    decayed, kept = [], []
    for parameter, (group, _) in part.model_param_group_index_map.items():
        (decayed if part.optimizer.param_groups[group]["weight_decay"] else kept).append(names[parameter])
    return decayed, kept


def _step(chunks: list[Any], optimizer: Any, samples: range) -> None:
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    forward_backward(chunks, [tiny.batch(samples)], forward_only=False)
    optimizer.step()


def clipped_sgd() -> tuple[float, float]:
    """How far one step of plain SGD at rate 1 moves the parameters, clipped at 0.5 and not clipped."""
    moved = []
    for clip in (0.5, 0.0):
        chunks = tiny.model(distributed=False)
        config = OptimizerConfig(name="sgd", lr=1.0, distributed=False, clip_grad=clip)
        optimizer, _ = build_optimizer(chunks, config, SchedulerConfig(name="constant"), steps=10)
        prepare(chunks, optimizer)
        before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
        _step(chunks, optimizer, range(4))
        after = zip(chunks[0].parameters(), before, strict=True)
        moved.append(float(torch.stack([(new - old).square().sum() for new, old in after]).sum().sqrt()))
    return moved[0], moved[1]


def sgd_in_halves(folder: str) -> tuple[list[list[float]], list[list[float]]]:
    """The parameters after four steps with momentum, at once and with a save and load in between."""

    def fresh() -> tuple[list[Any], Any]:
        chunks = tiny.model(distributed=False)
        config = OptimizerConfig(name="sgd", lr=0.1, distributed=False)
        optimizer, _ = build_optimizer(chunks, config, SchedulerConfig(name="constant"), steps=10)
        prepare(chunks, optimizer)
        return chunks, optimizer

    def values(chunks: list[Any]) -> list[list[float]]:
        return [parameter.flatten().tolist() for parameter in chunks[0].parameters()]

    chunks, optimizer = fresh()
    for start in range(4):
        if start == 2:
            checkpoint.save(Path(folder, "native"), chunks, progress=checkpoint.TrainingProgress(step=2), optimizer=optimizer)
        _step(chunks, optimizer, range(start, start + 4))
    whole = values(chunks)
    chunks, optimizer = fresh()
    checkpoint.load(Path(folder, "native"), chunks, optimizer=optimizer)
    for start in (2, 3):
        _step(chunks, optimizer, range(start, start + 4))
    return whole, values(chunks)
