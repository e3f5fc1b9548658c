"""Policy for bad steps: non-finite losses or gradients, and loss spikes, stop the run, are skipped or rolled back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

import megabridge.platform as platform
from megabridge.config.schema import PolicyConfig
from megabridge.errors import MegabridgeError

Action = Literal["go", "skip", "rollback"]


class TrainingError(MegabridgeError):
    """Training can't continue: a loss or gradient that is not finite, or a spike."""


class Guard:
    """Checks steps against the config's `policy`. Every rank has one and passes the same numbers, so that all act alike.

    `recent` are the losses that spikes are measured against, `faults` is the number of bad steps so far.
    """

    def __init__(self, policy: PolicyConfig) -> None:
        self.policy = policy
        self.recent: deque[float] = deque(maxlen=policy.spike_window)
        self.faults = 0

    @property
    def reads_every_step(self) -> bool:
        """Whether the host must read every step's loss and norm before the parameters change."""
        return self.policy.nonfinite != "stop" or self.policy.spike != "ignore"

    def resume(self, recent: Iterable[float]) -> None:
        """Continues with the losses of a checkpoint."""
        self.recent = deque(recent, maxlen=self.policy.spike_window)

    def judge(self, step: int, loss: float, norm: float) -> tuple[Action, str]:
        """Returns the action for optimizer step number `step`, before it is taken, and the reason as text ("" for a good step).

        Raises TrainingError where the policy is to stop, or its limit is reached.
        """
        fault, action = self._fault(step, loss, norm)
        if action == "go":
            self.recent.append(loss)
            return "go", ""
        self.faults += 1
        if action == "stop":
            raise TrainingError(
                f"{fault}; nothing of it is saved. Lower optimizer.lr, lengthen scheduler.warmup_steps, or look at the batch, and "
                "continue with checkpoint.resume=auto; policy.nonfinite and policy.spike can skip such steps."
            )
        if self.faults > self.policy.limit:
            raise TrainingError(
                f"{fault}; it is bad step number {self.faults}, and policy.limit={self.policy.limit} allows no more. Lower "
                "optimizer.lr, or raise the limit, and continue with checkpoint.resume=auto."
            )
        return action, fault

    def _fault(self, step: int, loss: float, norm: float) -> tuple[str, Literal["go", "stop", "skip", "rollback"]]:
        policy = self.policy
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {what} of step {step} is {value}", policy.nonfinite  # type: ignore[return-value]  # a choice
        if policy.spike == "ignore" or len(self.recent) < policy.spike_window:
            return "", "go"
        mean = sum(self.recent) / len(self.recent)
        if loss <= policy.spike_factor * mean:
            return "", "go"
        above = f"more than {policy.spike_factor:g} x the mean {mean:.4f} of the last {len(self.recent)}"
        return f"the loss of step {step} is {loss:.4f}, {above}", policy.spike  # type: ignore[return-value]  # a choice


def refuse_nonfinite(step: int, what: str, value: float) -> None:
    """Raises TrainingError for a non-finite number outside of training steps (the validation loss)."""
    if not math.isfinite(value):
        raise TrainingError(
            f"the {what} of step {step} is {value}; nothing of it is saved. Lower optimizer.lr or lengthen "
            "scheduler.warmup_steps, and continue with checkpoint.resume=auto."
        )


@torch.no_grad()
def refuse_nonfinite_parameters(step: int, chunks: Sequence[Any]) -> None:
    """Raises TrainingError on every rank if a parameter of any rank is not finite. Every rank calls it."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.is_floating_point()]
    flag = torch.ones((), dtype=torch.int32, device=platform.device())
    if parameters:
        norms = torch.stack(torch._foreach_norm(parameters, float("inf"), dtype=torch.float32))
        flag = norms.isfinite().all().to(torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    if not flag:
        raise TrainingError(
            f"parameters are not finite after step {step}, so it is not saved. Lower optimizer.lr or raise optimizer.eps, and "
            "continue with checkpoint.resume=auto."
        )
