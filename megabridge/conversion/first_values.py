"""Random weights that depend on the seed and on tensors' names alone: under every layout, on any device, the model begins the same.

A Hugging Face tensor is drawn in tiles, each from a generator of its own, and a rank draws those that its boxes touch: it needs the
memory of a few tiles, and its share of the time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

import torch

from megabridge.conversion.parameters import ParameterRecord, collect_parameters
from megabridge.conversion.plan import Expansion
from megabridge.conversion.read_loop import threads_of_a_rank
from megabridge.errors import MappingError
from megabridge.families import Family
from megabridge.hf.tensor_files import native_box, view
from megabridge.mapping import Same, Transfer, transfers
from megabridge.mapping.boxes import Axis, clip
from megabridge.mapping.dims import Dims

ROWS: Final = 1024
COLUMNS: Final = 256
"""Of a tile, in the last two dimensions; in others it is 1 long. So few, that a rank with some of the columns draws few in vain."""


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Tile `number` of the tensor `name`, and its pieces, whose Hugging Face side is the tile, in the parameter `target`."""

    name: str
    number: tuple[int, ...]
    pieces: list[Transfer]
    target: torch.Tensor
    deviation: float

    def fill(self, seed: int) -> None:
        """Draws the tile, N(0, deviation^2) in float32, and copies its pieces into the parameter, in the parameter's dtype."""
        word = hashlib.blake2b(
            f"{seed} {self.name} {self.number}".encode(), digest_size=4
        ).digest()  # all that torch takes of a seed
        generator = torch.Generator().manual_seed(int.from_bytes(word))
        drawn = torch.empty(self.pieces[0].hf_shape).normal_(0.0, self.deviation, generator=generator)
        values = drawn.to(self.target.device)
        for piece in self.pieces:
            native_box(self.target, piece).copy_(view(values, piece.hf_view()))


@torch.no_grad()
def draw(
    chunk: torch.nn.Module, deviations: Mapping[str, float], *, family: Family, native: Mapping[str, object], seed: int
) -> None:
    """Fills the parameters of `chunk` that `deviations` names, by their standard deviations; what no tensor feeds becomes zero.

    Nothing is exchanged. A parameter without a rule is drawn by its own canonical name.
    """
    expansion = Expansion(family, Dims.of(native))
    tiles: list[Tile] = []
    for live in collect_parameters([chunk]):
        if live.local not in deviations:
            continue
        live.data.zero_()
        pieces: dict[tuple[str, tuple[int, ...]], list[Transfer]] = {}
        for name, transfer in _named(expansion, live.record):
            for number, piece in by_tile(transfer):
                pieces.setdefault((name, number), []).append(piece)
        tiles += [Tile(*key, found, live.data, deviations[live.local]) for key, found in pieces.items()]
    with ThreadPoolExecutor(threads_of_a_rank()) as pool:
        for _ in pool.map(lambda tile: tile.fill(seed), tiles):
            pass


def _named(expansion: Expansion, record: ParameterRecord) -> list[tuple[str, Transfer]]:
    """Each transfer of a parameter with the name of its tensor."""
    try:
        entry = expansion.entry(record)
    except MappingError:
        return [(record.name, transfer) for transfer in transfers(Same(), record.shape, expansion.dims, record.cuts)]
    return [(entry.hf[transfer.part], transfer) for transfer in entry.transfers]


def by_tile(transfer: Transfer) -> Iterator[tuple[tuple[int, ...], Transfer]]:
    """(number, piece) for each piece of `transfer` in a tile of its tensor, with the tile in the tensor's place."""
    whole = transfer.hf_shape
    sizes = (ROWS * COLUMNS,) if len(whole) == 1 else (*[1] * (len(whole) - 2), ROWS, COLUMNS)
    choices = [_along(axis, 1 if axis.hf_dim is None else sizes[axis.hf_dim]) for axis in transfer.axes]
    for chosen in product(*choices):
        number = tuple(tile for tile, axis in chosen if axis.hf_dim is not None)
        shape = tuple(min(size, length - tile * size) for tile, size, length in zip(number, sizes, whole, strict=True))
        yield number, Transfer(transfer.part, shape, tuple(axis for _, axis in chosen))


def _along(axis: Axis, size: int) -> list[tuple[int, Axis]]:
    """The parts of `axis` in tiles of `size`, with the tile's number; there its indices begin at 0."""
    if axis.hf_dim is None:
        return [(0, axis)]
    found = []
    for tile in range(axis.hf.start // size, -(-axis.hf.stop // size)):
        for part in clip(_turned(axis), tile * size, (tile + 1) * size):
            there = replace(part.native, start=part.native.start - tile * size)
            found.append((tile, _turned(replace(part, native=there))))
    return found


def _turned(axis: Axis) -> Axis:
    """The axis with its sides exchanged: boxes are cut along the native one."""
    return Axis(axis.hf_dim, axis.native_dim, axis.hf, axis.native)
