"""Agreement between ranks: a failure on one rank is the same error on every rank, at once.

The only collectives that carry Python objects, or bytes of any kind. Without a process group there is one rank, and nothing is
exchanged. Where all goes well, ranks agree by one number: texts travel only when a rank failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

import torch
import torch.distributed as dist

from megabridge.errors import CheckpointError, ConfigError, MappingError, MegabridgeError, ParityError, message

_KINDS: Final = {kind.__name__: kind for kind in (ConfigError, MappingError, CheckpointError, ParityError)}
PIECE: Final = 64 << 20
"""Bytes of one message of `all_gather_bytes`: what it needs on a device."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather[T](value: T) -> list[T]:
    """Every rank's `value`, in rank order, on every rank. Collective; for plans and reports, never per parameter."""
    if world_size() == 1:
        return [value]
    out: list[T | None] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out  # type: ignore[return-value]


def all_gather_bytes(content: bytearray) -> Iterator[bytearray]:
    """Every rank's `content`, one after the other in rank order, on every rank. Collective: every rank iterates to the end.

    No more than one other rank's content is held at a time, besides what the caller keeps.
    """
    for source, size in enumerate(all_gather(len(content))):
        whole = content if source == rank() else bytearray(size)
        for begin in range(0, size if world_size() > 1 else 0, PIECE):
            piece = torch.frombuffer(whole, dtype=torch.uint8, count=min(PIECE, size - begin), offset=begin)
            sent = piece.to(communication_device(piece.device))
            dist.broadcast(sent, src=source)
            piece.copy_(sent)
        yield whole


def communication_device(home: torch.device) -> torch.device:
    """The device of tensors that the default group can move; `home` where there is one rank."""
    if world_size() == 1:
        return home
    is_nccl = "cuda:nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def _any(flag: bool) -> bool:
    """Whether `flag` holds on any rank. Collective."""
    if world_size() == 1:
        return flag
    worst = torch.tensor(int(flag), device=communication_device(torch.device("cpu")))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return bool(worst)


@contextmanager
def raise_together(what: str) -> Iterator[None]:
    """Runs a block on every rank and ends it for all alike. Collective.

    When the block raises on any rank, every rank raises: its own error where it had one, otherwise the first failing rank's, of
    the same type, with that rank named.
    """
    own: BaseException | None = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        own = error
    if not _any(own is not None):
        return
    failures = all_gather(None if own is None else (type(own).__name__, message(own)))
    if own is not None:
        raise own
    for number, failure in enumerate(failures):
        if failure is not None:
            kind, text = failure
            raise _KINDS.get(kind, MegabridgeError)(f"rank {number} failed while {what}: {kind}: {text}")


def together_where_cheap(what: str) -> AbstractContextManager[None]:
    """`raise_together` where ranks meet on their hosts: for what is done in every step. Collective there.

    Where they meet on a device, whose work each step would wait for, an error is that of the rank that has it, and whoever started
    the ranks ends the others.
    """
    return raise_together(what) if communication_device(torch.device("cpu")).type == "cpu" else nullcontext()


def spread[T](what: str, count: int, work: Callable[[int], T]) -> list[T]:
    """`work(number)` for every number below `count`, each done by one rank; all results on every rank. Collective."""
    mine: list[T] = []
    with raise_together(what):
        mine = [work(number) for number in range(rank(), count, world_size())]
    parts = all_gather(mine)
    return [parts[number % len(parts)][number // len(parts)] for number in range(count)]


def on_rank_zero[T](what: str, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and returns its picklable result on every rank; where it raises, every rank raises. Collective."""
    result: T | None = None
    with raise_together(what):
        if rank() == 0:
            result = work()
    answer: list[T | None] = [result]
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]  # type: ignore[return-value]
