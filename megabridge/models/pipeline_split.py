"""Splits the layers of a model over pipeline stages and their virtual chunks."""

from __future__ import annotations

from megabridge.config.layout_rules import stage_problems
from megabridge.errors import ConfigError, listed


def split_layers(num_layers: int, *, pp: int, vpp: int = 1) -> list[int]:
    """Layers per chunk, in the order in which a token passes them: chunk `v * pp + p` is on stage p.

    Where the number of chunks doesn't divide that of layers, the first and the last chunk have fewer: they also hold the
    embedding and the output layer. The last has the fewest, because the loss costs more than the embedding. Raises
    ConfigError when a chunk between them would be empty.
    """
    chunks = pp * vpp
    if problems := stage_problems(num_layers, pp=pp, vpp=vpp):
        raise ConfigError(listed(problems))
    each, extra = divmod(num_layers, chunks)
    layers = [each] * chunks
    heavier = [*range(1, chunks - 1), 0]  # the middle first, then the first chunk, never the last
    for chunk in heavier[:extra]:
        layers[chunk] += 1
    return layers


def layout_of(layers: list[int], *, mtp: int = 0) -> list[list[str]]:
    """The contents of each chunk, in passing order, in the form of megatron-core's `pipeline_model_parallel_layout`.

    `mtp` multi-token-prediction layers come before the loss.
    """
    layout = [["decoder"] * count for count in layers]
    layout[0].insert(0, "embedding")
    layout[-1] += [*["mtp"] * mtp, "loss"]
    return layout


def by_stage(layers: list[int], *, pp: int) -> list[list[int]]:
    """Layers per (stage, virtual chunk), from layers in passing order."""
    return [layers[stage::pp] for stage in range(pp)]
