"""Pretrains a model, from random weights or from a checkpoint's: recipe=pretrain.

The program is finetune's; what differs is in the config: the data, which asks for a loss on every token.
"""

from __future__ import annotations

from megabridge.config.schema import Config
from recipes import finetune


def main(config: Config) -> float | None:
    """Every rank calls it, in running process groups. Returns the validation loss at the end."""
    return finetune.main(config)
