"""Streams whole Hugging Face tensors between ranks in flat buckets; the next bucket is in flight while one is used.

Each rank packs its boxes of a bucket into one section of a buffer, the *wire*; sections are sent, and the consumers assemble them
in a second buffer, the *flat* tensor that they yield. Before a bucket is sent, all ranks exchange one integer: go on, closed or
failed. Python objects are exchanged only at the start, and when a stream ends early.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist

from megabridge.conversion.buckets import Bucket, Entries, Section, WireBox, layout_of_bucket, plan_buckets
from megabridge.conversion.plan import Plan, TensorSpec
from megabridge.errors import ConfigError, MegabridgeError, listed
from megabridge.hf.tensor_files import native_box, view
from megabridge.loggers.bars import bytes_bar
from megabridge.parallel import collectives

BUCKET_BYTES: Final = 512 << 20
GO, CLOSED, FAILED = 0, 1, 2


class _Ended(Exception):
    """Ends a stream on this rank without an error."""


class Stream:
    """Streams the tensors of `specs`, in this order, to the ranks in `consumers` (None: all).

    Every rank creates one and exhausts it. `cpu` copies tensors to the host; `in_rows` sends a tensor that is larger than a bucket
    in blocks of rows. Raises ConfigError on every rank when the ranks' arguments differ. When a rank closes it early, the next step
    of the other consumers raises MegabridgeError; when one fails, every rank raises its error.
    """

    def __init__(
        self,
        plan: Plan,
        specs: Mapping[str, TensorSpec],
        *,
        cpu: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
        consumers: Collection[int] | None = None,
        in_rows: bool = False,
    ) -> None:
        self._rank, self._world = collectives.rank(), collectives.world_size()
        self._consumers = _agreed(specs, bucket_bytes, consumers, self._world)
        self._is_consumer = self._rank in self._consumers
        self._plan = plan
        self._buckets = plan_buckets(specs, bucket_bytes, in_rows=in_rows)
        self._count = sum(len(bucket.entries) for bucket in self._buckets)
        self._delivered = 0  # tensors that were yielded to the caller
        self._parameters = {item.record.name: item.local for item in plan.items}
        self._home = plan.items[0].local.data.device if plan.items else torch.device("cpu")
        self._wire_device = collectives.communication_device(self._home)  # where the wire lies
        self._to_host = cpu and self._home.type != "cpu"
        self._buffers: dict[str, torch.Tensor] = {}
        self._sections: list[Section] = []  # of the bucket on the wire
        self._works: list[Any] = []
        self._next = 0  # number of the bucket that is sent next
        self._error: Exception | None = None
        self._is_leaving = False

    # ------------------------------------------------------------------ iterators for callers

    def flat(self) -> Generator[tuple[torch.Tensor, Entries]]:
        """Yields (flat bytes, entries) of every bucket; the bytes are valid until the next step."""
        return _primed(self._flat())

    def tensors(self, *, show_progress: bool) -> Generator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor) of every tensor; each owns its storage."""
        return _primed(self._tensors(show_progress))

    def _flat(self) -> Generator[tuple[torch.Tensor, Entries]]:
        with closing(self._steps()) as steps:
            next(steps)
            yield torch.empty(0), ()
            for flat, entries in steps:
                self._delivered += len(entries)
                yield flat, entries

    def _tensors(self, show_progress: bool) -> Generator[tuple[str, torch.Tensor]]:
        show = show_progress and self._rank == min(self._consumers)
        with closing(self._steps()) as steps:
            next(steps)
            yield "", torch.empty(0)
            with bytes_bar("stream", show=show) as progress:
                done, total = 0, sum(bucket.size for bucket in self._buckets)
                for flat, entries in steps:
                    for entry in entries:
                        self._delivered += 1
                        done += entry.nbytes
                        progress(done, total)
                        yield entry.name, entry.view(flat).clone()

    # ------------------------------------------------------------------ the steps

    def _steps(self) -> Generator[tuple[torch.Tensor, Entries]]:
        """Yields an empty bucket, then all buckets. From the first on, closing or dropping the generator tells the other ranks."""
        is_handed_over = True
        try:
            yield torch.empty(0), ()
            is_handed_over = False
            self._send_next()
            for bucket in self._buckets:
                self._wait()
                self._guarded(partial(self._join, bucket))
                self._send_next()
                self._guarded(partial(self._copy_to_host, bucket))
                if self._is_consumer and self._error is None:
                    is_handed_over = True
                    yield self._buffers["host" if self._to_host else "flat"][: bucket.size], bucket.entries
                    is_handed_over = False
            if self._error is not None:
                raise self._error  # of the last bucket's copy to the host, after the last exchange of states
        except _Ended:
            return
        finally:
            if is_handed_over:
                self._leave()
            self._buffers.clear()

    def _guarded(self, work: Callable[[], object]) -> None:
        """Keeps an error of this rank until all ranks exchange their state."""
        if self._error is None:
            try:
                work()
            except Exception as error:
                self._error = error

    def _send_next(self) -> None:
        """Packs the next bucket, exchanges states and sends it; after the last one, exchanges states only.

        Ends or raises on all ranks.
        """
        number = self._next
        self._next += 1
        is_last = number == len(self._buckets)
        if not is_last and not self._is_leaving:
            self._guarded(partial(self._pack, self._buckets[number]))
        # Closing after the last bucket was sent is no error: every consumer has received the whole model.
        own = FAILED if self._error is not None else CLOSED if self._is_leaving and not is_last else GO
        if self._worst(own) != GO:
            self._end()
        if not is_last:
            self._works = self._send()

    def _worst(self, own: int) -> int:
        if self._world == 1:
            return own
        state = torch.tensor([own], dtype=torch.int32, device=self._wire_device)
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        return int(state.item())

    def _end(self) -> None:
        """Ends the stream: raises a failed rank's error on every rank, else MegabridgeError on consumers that didn't close it."""
        states = collectives.all_gather((self._is_leaving, self._delivered))
        with collectives.raise_together("streaming weights"):
            if self._error is not None:
                raise self._error
        if self._is_consumer and not self._is_leaving:
            rank, count = next((rank, count) for rank, (is_leaving, count) in enumerate(states) if is_leaving)
            raise MegabridgeError(
                f"rank {rank} closed the stream after {count} of {self._count} tensors, so this rank has no whole model; "
                "consume the stream to its end on every rank, or close it on all."
            )
        raise _Ended

    def _leave(self) -> None:
        if self._world > 1 and not dist.is_initialized():
            return  # dropped after the groups were stopped: no rank is waiting
        self._is_leaving = True
        try:
            self._wait()
            if self._next <= len(self._buckets):
                self._send_next()
        except (_Ended, MegabridgeError):
            return

    # ------------------------------------------------------------------ packing, sending, joining

    def _pack(self, bucket: Bucket) -> None:
        self._sections, size = layout_of_bucket(bucket, self._plan, self._rank, self._consumers)
        wire = self._buffer("wire", size, self._wire_device)
        for section in self._sections:
            if section.rank == self._rank and section.is_sent:
                for piece in section.pieces:
                    piece.view(wire).copy_(self._own(piece))

    def _send(self) -> list[Any]:
        wire = self._buffers["wire"]
        moving = [section for section in self._sections if section.is_sent]
        if len(self._consumers) == self._world:
            return [dist.broadcast(wire[s.start : s.stop], src=s.rank, async_op=True) for s in moving]
        operations = []
        for section in moving:
            data = wire[section.start : section.stop]
            if section.rank == self._rank:
                operations += [dist.P2POp(dist.isend, data, peer) for peer in sorted(self._consumers) if peer != self._rank]
            else:
                operations.append(dist.P2POp(dist.irecv, data, section.rank))
        return dist.batch_isend_irecv(operations) if operations else []

    def _wait(self) -> None:
        while self._works:
            self._works.pop(0).wait()

    def _join(self, bucket: Bucket) -> None:
        """Copies the received pieces into the flat tensor."""
        if not self._is_consumer:
            return
        flat, wire = self._buffer("flat", bucket.size, self._home), self._buffers["wire"]
        for section in self._sections:
            for piece in section.pieces:
                box = view(piece.entry.view(flat), piece.transfer.hf_view())
                box.copy_(piece.view(wire) if section.is_sent else self._own(piece))

    def _copy_to_host(self, bucket: Bucket) -> None:
        """Copies the flat tensor to the host, if the caller asked for that, while the next bucket is sent."""
        if self._is_consumer and self._to_host:
            host = self._buffer("host", bucket.size, torch.device("cpu"))
            host.copy_(self._buffers["flat"][: bucket.size], non_blocking=True)
            torch.cuda.current_stream(self._home).synchronize()

    def _own(self, piece: WireBox) -> torch.Tensor:
        return native_box(self._parameters[piece.native].data, piece.transfer)

    def _buffer(self, name: str, size: int, device: torch.device) -> torch.Tensor:
        """Returns `size` bytes of a buffer that is reused from bucket to bucket and replaced where it is too small."""
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers.pop(name, None)  # freed before the new one is allocated
            self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=device, pin_memory=name == "host")
        return self._buffers[name][:size]


def _primed[T](generator: Generator[T]) -> Generator[T]:
    """Advances a generator past its first, empty step, so that closing or dropping it runs its `finally` in any case."""
    next(generator)
    return generator


def _agreed(specs: Mapping[str, TensorSpec], bucket_bytes: int, consumers: Collection[int] | None, world: int) -> frozenset[int]:
    """Returns the consumers, after checking that every rank has the same arguments. Collective."""
    with collectives.raise_together("starting the stream"):
        if bucket_bytes < 1:
            raise ConfigError(f"bucket_bytes={bucket_bytes} must be a number of bytes from 1.")
        wanted = frozenset(range(world) if consumers is None else consumers)
        if not wanted or not wanted <= set(range(world)):
            raise ConfigError(f"consumers={sorted(wanted)} must name one or more of the ranks 0 to {world - 1}.")
    text = repr((list(specs.items()), bucket_bytes, sorted(wanted)))
    _check_equal(collectives.all_gather(hashlib.sha256(text.encode()).hexdigest()))
    return wanted


def _check_equal(digests: Sequence[str]) -> None:
    others = [f"rank {rank}" for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ConfigError(
            "conversion_tasks, weight_dtype, bucket_bytes and consumers must be equal on every rank; these differ from rank 0:\n  "
            + listed(others)
        )
