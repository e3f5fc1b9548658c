"""One rank's failure is every rank's: file work whose errors all ranks raise, so that none waits in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megabridge.errors import CheckpointError


def on_rank_zero[T](work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and returns its (picklable) result on every rank; an error is raised on every rank."""
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as caught:
            error = caught
            outcome[1] = _describe(caught)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1]) from error
    result: T = outcome[0]
    return result


def agree[T](work: Callable[[], T]) -> T:
    """Runs `work`, which calls no collective, on every rank; where any rank fails, all raise the first one's error."""
    result: T
    caught: Exception | None = None
    try:
        result = work()
    except Exception as error:
        caught = error
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if caught is None else _describe(caught))
    failed = [(rank, text) for rank, text in enumerate(errors) if text is not None]
    if failed:
        rank, text = failed[0]
        raise CheckpointError(f"{text} (on rank {rank})" if rank else text) from caught
    return result


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
