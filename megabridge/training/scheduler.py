"""Learning-rate schedule: megatron-core's OptimizerParamScheduler from the typed config (warm-up, decay, WSD)."""

from __future__ import annotations

from typing import Any

from megabridge.config.schema import OptimizerConfig, SchedulerConfig
from megabridge.errors import ConfigError

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def build_scheduler(built: Any, optimizer: OptimizerConfig, scheduler: SchedulerConfig, *, steps: int) -> Any:
    """Builds the OptimizerParamScheduler of megatron-core's optimizer `built` for a run of `steps` steps.

    Raises ConfigError where the warm-up, the decay and the number of steps don't fit together.
    """
    decay_steps = max(steps, 1)
    wsd_steps = None
    if scheduler.name == "wsd":
        wsd_steps = max(1, steps // 10) if scheduler.decay_steps is None else scheduler.decay_steps
        if wsd_steps > decay_steps:
            raise ConfigError(f"scheduler.decay_steps={wsd_steps} must be at most recipe.steps={steps} for scheduler.name=wsd.")
    elif scheduler.decay_steps is not None:
        decay_steps = scheduler.decay_steps
    if scheduler.name == "constant":
        decay_steps = max(decay_steps, scheduler.warmup_steps + 1)
    if scheduler.warmup_steps >= decay_steps:
        raise ConfigError(
            f"scheduler.warmup_steps={scheduler.warmup_steps} must be less than the {decay_steps} steps over which the rate "
            "decays; shorten the warm-up or raise recipe.steps."
        )
    if scheduler.min_lr > optimizer.lr:
        raise ConfigError(f"scheduler.min_lr={scheduler.min_lr} must be at most optimizer.lr={optimizer.lr}.")
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
