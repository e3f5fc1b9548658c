"""megatron-core's optimizer and learning-rate schedule from the typed config; with and without Transformer Engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import torch

import megabridge.platform as platform
from megabridge.config import validation
from megabridge.config.schema import OptimizerConfig, SchedulerConfig
from megabridge.errors import ConfigError, listed
from megabridge.native import optimizer_state
from megabridge.platform.patches import sgd_momentum

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.utils import get_model_config


def build_optimizer(
    chunks: Sequence[Any], optimizer: OptimizerConfig, scheduler: SchedulerConfig, *, steps: int
) -> tuple[Any, Any]:
    """megatron-core's optimizer over the DDP-wrapped `chunks` and its OptimizerParamScheduler; one scheduler step is one
    optimizer step. Every rank calls it. Parameters of one dimension are not decayed, as in megatron-core, nor those that
    `optimizer.no_decay` names.

    Raises ConfigError where a setting can't work.
    """
    _check(chunks, optimizer)
    model = get_model_config(chunks[0])
    built = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer=optimizer.name,
            lr=optimizer.lr,
            min_lr=scheduler.min_lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            sgd_momentum=optimizer.momentum,
            clip_grad=optimizer.clip_grad,
            use_distributed_optimizer=optimizer.distributed,
            overlap_param_gather=optimizer.overlap_param_gather,
            bf16=model.bf16,
            fp16=model.fp16,
            params_dtype=model.params_dtype,
            loss_scale=optimizer.loss_scale,
            initial_loss_scale=optimizer.initial_loss_scale,
            min_loss_scale=optimizer.min_loss_scale,
            loss_scale_window=optimizer.loss_scale_window,
            hysteresis=optimizer.hysteresis,
        ),
        list(chunks),
        config_overrides={_not_decayed(optimizer.no_decay): ParamGroupOverride(wd_mult=0.0)},
    )
    for part in optimizer_state.parts(built):
        if isinstance(part.optimizer, torch.optim.AdamW) and not platform.is_cpu():
            for group in part.optimizer.param_groups:
                # One kernel over all parameters; megatron-core leaves torch's default, one per parameter and operation.
                group.update(fused=True, foreach=False)
        if isinstance(part.optimizer, torch.optim.SGD):
            sgd_momentum.install(part)
    return built, _schedule(built, optimizer, scheduler, steps)


def ddp_settings(optimizer: OptimizerConfig) -> dict[str, object]:
    """The `ddp_config` of provide_distributed_model that goes with this optimizer."""
    return {
        "use_distributed_optimizer": optimizer.distributed,
        "overlap_grad_reduce": optimizer.overlap_grad_reduce,
        "overlap_param_gather": optimizer.overlap_param_gather,
    }


def _not_decayed(patterns: Sequence[str]) -> ParamKey:
    """What megatron-core asks of each parameter to find its group; names begin with `module.` of each wrapper."""

    def is_kept(parameter: torch.Tensor, name: str) -> bool:
        while name.startswith("module."):
            name = name.removeprefix("module.")
        return parameter.dim() == 1 or any(fnmatchcase(name, pattern) for pattern in patterns)

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name="no_decay", fn=is_kept))


def _check(chunks: Sequence[Any], optimizer: OptimizerConfig) -> None:
    fp16 = get_model_config(chunks[0]).fp16
    if optimizer.loss_scale is not None and not fp16:
        raise ConfigError(f"optimizer.loss_scale={optimizer.loss_scale} needs model.dtype=float16; leave it null.")
    if optimizer.overlap_param_gather and not (optimizer.distributed and optimizer.overlap_grad_reduce):
        raise ConfigError(
            "optimizer.overlap_param_gather=true needs optimizer.distributed=true and optimizer.overlap_grad_reduce=true; set both."
        )
    if optimizer.name == "sgd" and optimizer.distributed:
        raise ConfigError(
            "optimizer.name=sgd has no distributed form in megatron-core; set optimizer.distributed=false or optimizer.name=adam."
        )
    wanted, wrapped = ddp_settings(optimizer), asdict(chunks[0].ddp_config)
    problems = [
        f"optimizer.{name.replace('use_distributed_optimizer', 'distributed')}={value} must match the model's "
        f"ddp_config.{name}={wrapped[name]}; give provide_distributed_model(ddp_config={wanted})."
        for name, value in wanted.items()
        if wrapped[name] != value
    ]
    if problems:
        raise ConfigError(listed(problems))


def _schedule(built: Any, optimizer: OptimizerConfig, scheduler: SchedulerConfig, steps: int) -> Any:
    if problems := validation.schedule_problems(optimizer, scheduler, steps):
        raise ConfigError(listed(problems))
    wsd_steps = validation.wsd_steps(scheduler, steps) if scheduler.name == "wsd" else None
    decay_steps = validation.decay_steps(scheduler, steps)
    return OptimizerParamScheduler(
        built,
        # The first step of a warm-up is one part of the peak, not 0: a step at 0 would be lost.
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
