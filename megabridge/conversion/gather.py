"""Exports where ranks share no file system: rank 0 receives every tensor, writes the files, and verifies them by digests."""

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

BUCKET_BYTES: Final = 48 << 20  # so that two of them take less than 128 MiB

Digests = list[tuple[str, Transfer, bytes]]


class Gathered:
    """Iterates, on rank 0, over the boxes that fill the files `infos`, in their order; elsewhere over none.

    Every rank creates one and exhausts it. Each box is a whole tensor or a block of its rows, valid until the next step. If one
    rank fails, the next step of every rank raises its error; a rank that ends early must call `close`.
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
    """Returns the transfer from a block of rows to its place in the whole tensor."""
    starts = (entry.row, *[0] * (len(shape) - 1))
    axes = [
        Axis(dim, dim, Run.span(0, length), Run.span(start, length))
        for dim, (start, length) in enumerate(zip(starts, entry.shape, strict=False))
    ]
    return Transfer(0, shape, tuple(axes))


def compare_gathered(plan: Plan, infos: Mapping[str, TensorInfo], encoder: Encoder) -> Difference:
    """Compares the files on rank 0 with every rank's copies, by digests of their boxes. Collective.

    Digests don't show how far a tensor is off: where one differs, the largest difference is infinite.
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
    """Returns (tensor, box, digest) of all boxes that this rank holds, encoded as the files should have them."""
    out: Digests = [(name, whole(tensor.shape), _digest(iter([tensor]))) for name, tensor in encoder.scales()]
    for item in plan.items:
        for transfer in item.transfers:
            for name in plan.copies_of(item.hf[transfer.part], infos):
                parts = transfer.split(STAGING)
                out.append((name, transfer, _digest(encoder.encode(infos[name], p, native_box(item.local.data, p)) for p in parts)))
    return out


def _digest(parts: Iterator[torch.Tensor]) -> bytes:
    """Returns the digest of the elements' bytes, in the order of the tensor's dimensions."""
    total = xxhash.xxh3_128()
    for part in parts:
        total.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.digest()
