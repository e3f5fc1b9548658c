"""Learning-rate schedule: megatron-core's OptimizerParamScheduler from the typed config (warm-up, decay, WSD)."""

from __future__ import annotations

from typing import Any

from megabridge.config import validation
from megabridge.config.schema import OptimizerConfig, SchedulerConfig
from megabridge.errors import ConfigError, listed

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def build_scheduler(built: Any, optimizer: OptimizerConfig, scheduler: SchedulerConfig, *, steps: int) -> Any:
    """Builds the OptimizerParamScheduler of megatron-core's optimizer `built` for a run of `steps` steps.

    Raises ConfigError where the warm-up, the decay and the number of steps don't fit together.
    """
    if problems := validation.schedule_problems(optimizer, scheduler, steps):
        raise ConfigError(listed(problems))
    wsd_steps = validation.wsd_steps(scheduler, steps) if scheduler.name == "wsd" else None
    decay_steps = validation.decay_steps(scheduler, steps)
    return OptimizerParamScheduler(
        built,
        # The warm-up starts at peak / (warmup_steps + 1), not at 0: a step at 0 would be lost.
        init_lr=optimizer.lr / (scheduler.warmup_steps + 1) if scheduler.warmup_steps else optimizer.lr,
        max_lr=optimizer.lr,
        min_lr=scheduler.min_lr,
        lr_warmup_steps=scheduler.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style="WSD" if scheduler.name == "wsd" else scheduler.name,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd_steps,
        lr_wsd_decay_style=scheduler.wsd_decay if wsd_steps is not None else None,
    )
