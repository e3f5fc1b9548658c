"""Exports where ranks share no file system: rank 0 is sent every tensor, writes the files, and compares them with digests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch
import xxhash

from megabridge.conversion.buckets import BucketEntry
from megabridge.conversion.compare import Difference
from megabridge.conversion.encoding import Encoder
from megabridge.conversion.plan import Plan
from megabridge.conversion.stream import Stream
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import STAGING, Reader, native_box
from megabridge.mapping import Axis, Run, Transfer, whole
from megabridge.parallel import collectives

BUCKET_BYTES: Final = 48 << 20  # two of them stay below 128 MiB

Digests = list[tuple[str, Transfer, bytes]]


class Gathered:
    """On rank 0, the boxes that fill the files `infos`, in their order; elsewhere none. Every rank makes one and uses it up.

    Each is a whole tensor or a block of rows, with the file it belongs to, valid until the next step. Where one rank fails, every
    rank's next step raises its error; a rank that ends early must `close`.
    """

    def __init__(self, plan: Plan, infos: Mapping[str, TensorInfo], encoder: Encoder) -> None:
        specs = encoder.unquantised(infos)
        self._infos = infos
        self._buckets = Stream(plan, specs, bucket_bytes=BUCKET_BYTES, consumers=[0], in_rows=True).flat()

    def __iter__(self) -> Iterator[tuple[TensorInfo, tuple[Transfer, ...], torch.Tensor]]:
        for flat, entries in self._buckets:
            for entry in entries:
                info = self._infos[entry.name]
                yield info, (_block(entry, info.shape),), entry.view(flat)

    def close(self) -> None:
        self._buckets.close()


def _block(entry: BucketEntry, shape: tuple[int, ...]) -> Transfer:
    """From a block of rows to its place in the whole tensor."""
    starts = (entry.row, *[0] * (len(shape) - 1))
    axes = [
        Axis(dim, dim, Run.span(0, length), Run.span(start, length))
        for dim, (start, length) in enumerate(zip(starts, entry.shape, strict=False))
    ]
    return Transfer(0, shape, tuple(axes))


def compare_gathered(plan: Plan, infos: Mapping[str, TensorInfo], encoder: Encoder) -> Difference:
    """Compares the files on rank 0 with every rank's copies, by digests of their boxes' bits. Collective.

    How far a differing tensor is off isn't known: the largest difference is then infinite.
    """
    with collectives.raise_together("comparing weights"):
        own = _digests(plan, infos, encoder)
    everyone = collectives.all_gather(own)

    def compare() -> set[str]:
        known: dict[tuple[str, Transfer], bytes] = {}
        with Reader(infos.values()) as reader:
            for name, transfer, _ in (record for records in everyone for record in records):
                if (name, transfer) not in known:
                    known[name, transfer] = _digest(reader.box(infos[name], part) for part in transfer.split(STAGING))
            reader.finish()
        return {name for records in everyone for name, transfer, digest in records if known[name, transfer] != digest}

    names = collectives.on_rank_zero("comparing weights", compare)
    seen = sum(transfer.elements * infos[name].dtype.itemsize for records in everyone for name, transfer, _ in records)
    return Difference(tuple(sorted(names)), float("inf") if names else 0.0, seen)


def _digests(plan: Plan, infos: Mapping[str, TensorInfo], encoder: Encoder) -> Digests:
    """(tensor, box, digest) of all that this rank holds, as the files should have it."""
    out: Digests = [(name, whole(tensor.shape), _digest(iter([tensor]))) for name, tensor in encoder.scales()]
    for item in plan.items:
        for transfer in item.transfers:
            for name in plan.carriers(item.hf[transfer.part], infos):
                parts = transfer.split(STAGING)
                out.append((name, transfer, _digest(encoder.encode(infos[name], p, native_box(item.live.data, p)) for p in parts)))
    return out


def _digest(parts: Iterator[torch.Tensor]) -> bytes:
    """Of the elements' bits, in the order of the tensor's dimensions."""
    total = xxhash.xxh3_128()
    for part in parts:
        total.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.digest()
