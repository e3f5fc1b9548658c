"""Comparing what two runs hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer

RUN = "tests.support.training:run"


def trained(ranks: RankServer, topology: Topology, folder: Path, **kwargs: Any) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = ranks.run(RUN, topology=topology, kwargs={"run_dir": str(folder), **kwargs})
    return results


def merged(results: list[dict[str, Any]], what: str) -> dict[str, torch.Tensor]:
    """One dict over all ranks; shards that several ranks hold must be equal."""
    found: dict[str, torch.Tensor] = {}
    for result in results:
        for name, tensor in result[what].items():
            assert name not in found or torch.equal(found[name], tensor), name
            found[name] = tensor
    return found


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def without_padding(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embedding's rows that tokens have: how many more there are depends on tp."""
    return {name: tensor[:61] if "word_embeddings" in name else tensor for name, tensor in tensors.items()}


def whole_tensors(results: list[dict[str, Any]], what: str) -> dict[str, torch.Tensor]:
    """Global tensors put together from the shards of all ranks (names end in the shard's offset)."""
    pieces: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    for name, tensor in merged(results, what).items():
        key, _, offset = name.partition("[")
        place = tuple(int(number) for number in offset.rstrip("]").split(",")) if offset else ()
        pieces.setdefault(key, {})[place] = tensor
    return {key: _joined(shards) for key, shards in pieces.items()}


def _joined(shards: dict[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
    places = list(shards)
    rank = len(places[0])
    blocks = {place: tensor.reshape((1,) * (rank - tensor.dim()) + tensor.shape) for place, tensor in shards.items()}
    for axis in reversed(range(rank)):
        rows: dict[tuple[int, ...], list[tuple[int, torch.Tensor]]] = {}
        for place, block in blocks.items():
            rows.setdefault((*place[:axis], 0, *place[axis + 1 :]), []).append((place[axis], block))
        blocks = {
            place: torch.cat([block for _, block in sorted(row, key=lambda item: item[0])], axis) for place, row in rows.items()
        }
    (whole,) = blocks.values()
    return whole
