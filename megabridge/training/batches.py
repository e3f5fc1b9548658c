"""Micro-batches of a step: their number on this rank, and their transfer to the device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import megabridge.platform as platform
from megabridge.config import layout_rules
from megabridge.config.schema import Config
from megabridge.errors import ConfigError, listed
from megabridge.parallel import process_groups
from megabridge.parallel.collectives import raise_together_if_cheap
from megabridge.training.step import Batch


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    """Takes the next `count` micro-batches; on CUDA in pinned memory, without which a copy waits for the device. Collective."""
    with raise_together_if_cheap("taking a step's batches"):
        taken = list(islice(batches, count))
    if platform.is_cpu():
        return taken
    return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in taken]


def micro_batches(config: Config) -> int:
    """Number of micro-batches of one optimizer step on this data-parallel rank. Raises ConfigError where it isn't whole."""
    recipe, topology = config.recipe, process_groups.running()
    if problems := layout_rules.step_problems(config, topology):
        raise ConfigError(listed(problems))
    return recipe.global_batch_size // (recipe.micro_batch_size * topology.dp)
