"""What the ranks of tests/callbacks run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.callbacks import progress
from megabridge.callbacks.hf_export import HFExport
from megabridge.callbacks.parity import compare_logits
from megabridge.config.schema import Config, RecipeConfig
from tests.support import models, tiny


class FakeTrainer:
    """The attributes that a callback reads."""

    def __init__(self, config: Config, **more: Any) -> None:
        self.config = config
        self.step = 0
        self.is_main = True
        self.logged: dict[str, float] = {}
        self.__dict__.update(more)

    def log(self, metrics: dict[str, float]) -> None:
        self.logged |= metrics


def bars() -> tuple[str, str]:
    """What a progress bar over three steps leaves on a terminal, and where there is none."""
    written = []
    for terminal in (True, False):
        stream = io.StringIO()
        progress.stdout = Console(file=stream, force_terminal=terminal, width=100)
        trainer: Any = FakeTrainer(Config(recipe=RecipeConfig(steps=3)))
        bar = progress.Progress()
        for step in (1, 2, 3):
            bar.before_step(trainer)
            trainer.step = step
            bar.after_step(trainer, {"train/loss": 1.5} if step == 3 else {})
        written.append(stream.getvalue())
    return written[0], written[1]


def changed_after_import(folder: str) -> tuple[dict[str, float], dict[str, float]]:
    """The figures of a model as imported, and with one value changed."""
    source = models.write_model(Path(folder), models.TINY)
    bridge = AutoBridge.from_hf_pretrained(source)
    chunks = bridge.to_megatron_model()
    figures = []
    for change in (0.0, 1.0):
        with torch.no_grad():
            chunks[0].decoder.layers[0].mlp.linear_fc2.weight[3, 5] += change
        trainer: Any = FakeTrainer(Config(), bridge=bridge, chunks=chunks)
        compare_logits(trainer, source, 64, prefix="import")
        figures.append(trainer.logged)
    return figures[0], figures[1]


def without_bridge(run_dir: str) -> None:
    """A trainer that is to export and has no bridge."""
    tiny.trainer(tiny.config(run_dir, steps=1), callbacks=[HFExport()]).fit()
