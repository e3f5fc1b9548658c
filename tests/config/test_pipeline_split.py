"""Dealing layers to chunks."""

from __future__ import annotations

import pytest

from megabridge.config.pipeline_split import by_stage, layout_of, split_layers
from megabridge.errors import ConfigError


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("vpp", [1, 2, 3])
def test_every_layer_once_and_the_ends_lighter(pp: int, vpp: int) -> None:
    for num_layers in range(max(1, pp * vpp - 2), 40):
        check(num_layers, pp=pp, vpp=vpp)


def test_chunks_without_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 x 2 leaves chunks without layers for num_layers=3; use at most 5"):
        split_layers(3, pp=3, vpp=2)


def check(num_layers: int, *, pp: int, vpp: int) -> None:
    chunks = pp * vpp
    layers = split_layers(num_layers, pp=pp, vpp=vpp)
    assert len(layers) == chunks and sum(layers) == num_layers
    assert max(layers) - min(layers) <= 1
    assert layers[-1] == min(layers), "the loss is on the last"
    assert layers[0] == min(layers) or min(layers[:-1], default=layers[0]) == max(layers), "then the first is spared"
    assert all(layers[1:-1]), "no chunk between is empty"


def test_layout() -> None:
    assert layout_of([1, 0, 2]) == [["embedding", "decoder"], [], ["decoder", "decoder", "loss"]]
    assert by_stage([1, 2, 3, 4], pp=2) == [[1, 3], [2, 4]]
