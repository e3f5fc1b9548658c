"""What the ranks of tests/training and tests/checkpoint/test_native.py run."""

from __future__ import annotations

from typing import Any

import torch

from megabridge.checkpoint import optimizer_state
from tests.cases import tiny


def run(run_dir: str, *, steps: int, options: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Trains; returns each step's metrics, this rank's parameters and optimizer state, and the validation loss."""
    recorder = tiny.Recorder()
    trainer = tiny.trainer(tiny.config(run_dir, steps=steps, **settings), callbacks=[recorder], **(options or {}))
    loss = trainer.fit()
    return {
        "losses": [step["train/loss"] for step in recorder.steps],
        "norms": [step["train/grad_norm"] for step in recorder.steps],
        "rates": [step["train/learning_rate"] for step in recorder.steps],
        "validation": loss,
        "parameters": parameters(trainer.chunks),
        "optimizer": state(trainer.optimizer, trainer.chunks),
        "step": trainer.step,
    }


def parameters(chunks: list[Any]) -> dict[str, torch.Tensor]:
    """Copies of this rank's parameters by their place in the global tensors."""
    return {name: shard.data.detach().clone() for name, shard in tiny.shards(chunks).items()}


def state(optimizer: Any, chunks: list[Any]) -> dict[str, torch.Tensor]:
    """Optimizer state by place in the global tensors, gathered over dp, and the number of steps."""
    optimizer_state.seed(optimizer)
    model = {"model" if len(chunks) == 1 else f"model{i}": c.module.sharded_state_dict() for i, c in enumerate(chunks)}
    found = {"step": torch.tensor(optimizer_state.common(optimizer)["step"])}
    sharded = optimizer_state.sharded(optimizer, model, loading=False)
    tiny.apply_factories(sharded)
    for entry in tiny.nested_values(sharded):
        if isinstance(entry, tiny.ShardedTensor):
            found[f"{entry.key}{list(entry.global_offset)}"] = entry.data.detach().clone()
    return found
