"""SharedFlag: a flag that any rank raises and all ranks read at every step, without waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import torch
import torch.distributed as dist

import megabridge.platform as platform

LAG: Final = 2
"""On CUDA: number of steps after which a flag is read. The device has finished the all-reduce by then, so reading does not wait."""


class SharedFlag:
    """Whether any rank has raised a flag. Every rank calls the same methods at the same steps."""

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.Tensor, Any]] = deque()

    def now(self, raised: bool) -> bool:
        """Whether any rank raises it now; waits for the device."""
        flag = torch.tensor(int(raised), device=platform.device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def soon(self, raised: bool) -> bool:
        """Whether any rank raised it: now on a CPU, `LAG` calls ago on CUDA."""
        if platform.is_cpu():
            return self.now(raised)
        flag = torch.tensor(int(raised)).pin_memory().to(platform.device(), non_blocking=True)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        host = torch.empty((), dtype=flag.dtype, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((host, event))
        if len(self._pending) <= LAG:
            return False
        earlier, passed = self._pending.popleft()
        passed.synchronize()
        return bool(earlier)
