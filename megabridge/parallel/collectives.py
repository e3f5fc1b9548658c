"""Collectives on Python objects and bytes, and errors that all ranks raise together.

No other module sends Python objects or bytes. Without a process group there is one rank, and nothing is sent. If all goes well,
`raise_together` sends one number; messages are sent only when a rank failed.
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
"""Bytes of one message of `all_gather_bytes`, which it needs on the device."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather[T](value: T) -> list[T]:
    """Returns every rank's `value`, in rank order, on every rank. Collective; for plans and reports, never per parameter."""
    if world_size() == 1:
        return [value]
    out: list[T | None] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out  # type: ignore[return-value]


def all_gather_bytes(content: bytearray) -> Iterator[bytearray]:
    """Yields every rank's `content`, in rank order, on every rank. Collective: every rank iterates to the end.

    It holds at most one other rank's content at a time.
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
    """Device of tensors that the default group can send; `home` if there is one rank."""
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
    """Raises on every rank if the block raises on any rank. Collective.

    A rank raises its own error if it had one, otherwise that of the first failing rank, of the same type and with that rank named.
    `what` says in the message what was done.
    """
    own: BaseException | None = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
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


def raise_together_if_cheap(what: str) -> AbstractContextManager[None]:
    """`raise_together` if ranks communicate on the host (gloo), for work in every step. Collective there.

    If they communicate on a device, for whose work each step would have to wait, only the failing rank raises, and the launcher
    ends the others.
    """
    return raise_together(what) if communication_device(torch.device("cpu")).type == "cpu" else nullcontext()


def distribute[T](what: str, count: int, work: Callable[[int], T]) -> list[T]:
    """Calls `work(number)` for every number below `count`, each on one rank; returns all results on every rank. Collective."""
    mine: list[T] = []
    with raise_together(what):
        mine = [work(number) for number in range(rank(), count, world_size())]
    parts = all_gather(mine)
    return [parts[number % len(parts)][number // len(parts)] for number in range(count)]


def on_rank_zero[T](what: str, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and returns its picklable result on every rank; if it raises, every rank raises. Collective."""
    result: T | None = None
    with raise_together(what):
        if rank() == 0:
            result = work()
    answer: list[T | None] = [result]
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]  # type: ignore[return-value]
