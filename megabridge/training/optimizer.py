"""Builds megatron-core's optimizer from the typed config, with and without Transformer Engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import torch

import megabridge.platform as platform
from megabridge.config.schema import OptimizerConfig, SchedulerConfig
from megabridge.errors import ConfigError, listed
from megabridge.native import optimizer_state
from megabridge.platform.patches import sgd_momentum
from megabridge.training.scheduler import build_scheduler

from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.utils import get_model_config


def build_optimizer(
    chunks: Sequence[Any], optimizer: OptimizerConfig, scheduler: SchedulerConfig, *, steps: int
) -> tuple[Any, Any]:
    """Builds megatron-core's optimizer of the DDP-wrapped `chunks` and its OptimizerParamScheduler. Every rank calls it.

    One scheduler step is one optimizer step. Weight decay leaves out parameters of one dimension, as in megatron-core, and those
    that `optimizer.no_decay` names. Raises ConfigError where a setting can't work.
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
    return built, build_scheduler(built, optimizer, scheduler, steps=steps)


def ddp_settings(optimizer: OptimizerConfig) -> dict[str, object]:
    """Returns the `ddp_config` for provide_distributed_model that matches this optimizer."""
    return {
        "use_distributed_optimizer": optimizer.distributed,
        "overlap_grad_reduce": optimizer.overlap_grad_reduce,
        "overlap_param_gather": optimizer.overlap_param_gather,
    }


def _not_decayed(patterns: Sequence[str]) -> ParamKey:
    """The key of the parameter group without weight decay; names begin with a `module.` for each wrapper."""

    def is_not_decayed(parameter: torch.Tensor, name: str) -> bool:
        while name.startswith("module."):
            name = name.removeprefix("module.")
        return parameter.dim() == 1 or any(fnmatchcase(name, pattern) for pattern in patterns)

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name="no_decay", fn=is_not_decayed))


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
