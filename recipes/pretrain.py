"""Pretrains a model, from random weights or from a checkpoint's: recipe=pretrain.

The program is that of finetune; only the config differs: its data has a loss on every token.
"""

from __future__ import annotations

from megabridge.config.schema import Config
from recipes import finetune


def main(config: Config) -> float | None:
    """Every rank calls it, in running process groups. Returns the validation loss at the end."""
    return finetune.main(config)
