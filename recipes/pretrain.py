"""Pretrains a model, from random weights or from a checkpoint's: recipe=pretrain.

The program is finetune's; what differs is in the config: the data, which asks for a loss on every token.
"""

from recipes.finetune import main

__all__ = ["main"]
