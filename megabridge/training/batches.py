"""How many micro-batches a step has on this rank, and their way to the device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import megabridge.platform as platform
from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.parallel.collectives import together_where_cheap
from megabridge.training.step import Batch

from megatron.core import parallel_state


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    """The next `count` micro-batches, on CUDA in pinned memory: a copy out of other memory waits for the device. Collective."""
    with together_where_cheap("taking a step's batches"):
        taken = list(islice(batches, count))
    if platform.is_cpu():
        return taken
    return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in taken]


def micro_batches(config: Config) -> int:
    """Micro-batches of one optimizer step on this data-parallel rank. Raises ConfigError where they don't come out even."""
    recipe = config.recipe
    dp: int = parallel_state.get_data_parallel_world_size()
    count, rest = divmod(recipe.global_batch_size, recipe.micro_batch_size * dp)
    if rest or not count:
        raise ConfigError(
            f"recipe.global_batch_size={recipe.global_batch_size} must be a multiple of recipe.micro_batch_size x dp = "
            f"{recipe.micro_batch_size} x {dp}; use {recipe.micro_batch_size * dp * max(count, 1)} or change either."
        )
    pp, vpp = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
    )
    if vpp is not None and count % pp:
        raise ConfigError(
            f"with parallel.vpp={vpp} the {count} micro-batches of a step must be a multiple of parallel.pp={pp}; use "
            f"recipe.global_batch_size={recipe.micro_batch_size * dp * pp * (count // pp + 1)}."
        )
    return count
