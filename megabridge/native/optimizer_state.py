"""Optimizer state of a native checkpoint, with workarounds that megatron-core 0.19.2 needs to load it correctly.

Without Transformer Engine and Apex, megatron/core/optimizer/distrib_optimizer.py (1) asserts when the optimizer has taken
no step yet, (2) raises KeyError 'step' while it copies the loaded state, and (3) gives every parameter one shared `step`
tensor, which torch's AdamW then increments once per parameter: a silently wrong second step. So the state is created before
it is requested (1), `step` is removed while the rest is read (2), and every parameter gets its own `step` afterwards (3).

With or without them, (4) a `fully_reshardable` save takes the state out of a buffer by offsets that count padding which is not
there (tied embeddings on the last pipeline stage have a bucket of their own): platform/patches/optimizer_offsets.py corrects
them.

With frozen parameters, or adapters alone, (5) a rank may have nothing to train, and (1) asserts again; and (6) layers are rows of
one tensor in a checkpoint, in which frozen layers would have no state. So the state of each layer is then a tensor of its own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import torch

import megabridge.platform
from megabridge.parallel.collectives import all_gather
from megabridge.platform.patches import optimizer_offsets

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

_STATE_KEY: Final = re.compile(r"optimizer\.state\.[^.]+\.(.+)")
_SHARDING: Final = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    # Dense and expert parameters have separate optimizers; names without the optimizer's number don't depend on ep.
    "chained_optim_avoid_prefix": True,
}


def parts(optimizer: Any) -> list[Any]:
    """The optimizers in megatron-core's chain that own parameters on this rank."""
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in chain if not part.is_stub_optimizer]


def seed(optimizer: Any) -> None:
    """Creates the state that torch's AdamW makes at its first step, where it has none yet: zeros, and step 0."""
    for part in parts(optimizer):
        for group, parameter in _adam_parameters(part):
            if part.optimizer.state[parameter]:
                continue
            part.optimizer.state[parameter] = {
                "step": _step(0, group, parameter),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def bytes_each(optimizer: Any) -> int:
    """Bytes of state that a checkpoint has for each trained element: moments, and where there is one the float32 master."""
    own = parts(optimizer)
    moments = 2 if any("betas" in group for part in own for group in part.optimizer.param_groups) else 1
    return 4 * (moments + int(not all(isinstance(part, FP32Optimizer) for part in own)))


def common(optimizer: Any) -> dict[str, Any]:
    """The state that is equal on all ranks: the number of updates, and FP16's loss scale."""
    values: dict[str, Any] = {"step": _steps_taken(optimizer)}
    scalers = [part.grad_scaler for part in parts(optimizer) if not isinstance(part, FP32Optimizer)]
    if scalers and scalers[0] is not None:
        values["grad_scaler"] = scalers[0].state_dict()
    return values


def sharded(optimizer: Any, model_state: Mapping[str, Any], *, loading: bool) -> Any:
    """Returns megatron-core's sharded state of the optimizer. Every rank calls it (it gathers over dp when saving)."""
    seed(optimizer)
    buffers = [buffer for part in parts(optimizer) if isinstance(part, DistributedOptimizer) for buffer in part.buffers]
    with optimizer_offsets.installed(buffers), _steps_without_parameters(optimizer):
        state = optimizer.sharded_state_dict(dict(model_state), is_loading=loading, metadata=_SHARDING)
    if frozen := _frozen_keys(model_state):
        dict_list_map_inplace(lambda entry: _unstacked(entry, frozen), state)
    return state


def _frozen_keys(model_state: Mapping[str, Any]) -> set[str]:
    """Checkpoint keys of parameters that are frozen on any rank. Every rank calls it."""
    entries = nested_values(dict(model_state))
    tensors = (entry for entry in entries if isinstance(entry, ShardedTensor | ShardedTensorFactory))
    # Buffers (a router's correction bias) require no gradient either, but never have state.
    here = {entry.key for entry in tensors if isinstance(entry.data, torch.nn.Parameter) and not entry.data.requires_grad}
    return set().union(*all_gather(here))


def _unstacked(entry: Any, frozen: Container[str]) -> Any:
    """Makes an entry of stacked layers an entry of its own layer, with the layer in its key, if layers of that stack are frozen."""
    match = _STATE_KEY.search(entry.key) if isinstance(entry, ShardedTensor | ShardedTensorFactory) else None
    if match is None or match[1] not in frozen:
        return entry
    if isinstance(entry, ShardedTensorFactory):
        build = entry.build_fn

        def built(*arguments: Any) -> Any:
            parts = build(*arguments)
            dict_list_map_inplace(lambda part: _unstacked(part, frozen), parts)
            return parts

        return replace(entry, build_fn=built)
    axes = entry.prepend_axis_num
    return replace(
        entry,
        key=".".join([entry.key, *map(str, entry.global_offset[:axes])]),
        global_shape=entry.global_shape[axes:],
        global_offset=entry.global_offset[axes:],
        axis_fragmentations=entry.axis_fragmentations[axes:],
        prepend_axis_num=0,
    )


@contextlib.contextmanager
def _steps_without_parameters(optimizer: Any) -> Iterator[None]:
    """Gives optimizers without parameters on this rank the number of steps of the others, within the block."""
    taken = torch.tensor(float(_steps_taken(optimizer)))
    empty: list[Any] = [
        part.optimizer for part in parts(optimizer) if isinstance(part.optimizer, torch.optim.AdamW) and not part.optimizer.state
    ]
    for inner in empty:
        inner.state["no parameter"] = {"step": taken}
    try:
        yield
    finally:
        for inner in empty:
            inner.state.pop("no parameter", None)


def restore(optimizer: Any, loaded: Any, common_values: Mapping[str, Any]) -> None:
    """Loads the tensors and the number of steps into the optimizer; hyperparameters are unchanged."""
    chained = isinstance(optimizer, ChainedOptimizer) and len(optimizer.chained_optimizers) > 1
    states = [loaded[index] for index in sorted(loaded)] if chained else [loaded]
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part, state in zip(chain, states, strict=True):
        if not part.is_stub_optimizer:
            _restore_part(part, state, common_values)


def _restore_part(part: Any, state: dict[str, Any], common_values: Mapping[str, Any]) -> None:
    step = int(common_values["step"])
    if "grad_scaler" in common_values and not isinstance(part, FP32Optimizer):
        state["grad_scaler"] = common_values["grad_scaler"]
    if isinstance(part, DistributedOptimizer):
        tensors = state.pop("param_state", {})  # missing if this rank has nothing to train
        state.pop("param_state_sharding_type")
        for group in state["optimizer"]["param_groups"]:
            group["step"] = step
        part.load_state_dict(state)
        for _, parameter in _adam_parameters(part):
            del part.optimizer.state[parameter]["step"]
        part.load_parameter_state_from_fully_reshardable(tensors)
    else:
        inner = state if isinstance(part, FP32Optimizer) else state["optimizer"]
        if isinstance(part.optimizer, torch.optim.AdamW):
            inner["state"]["common_step"] = torch.tensor(float(step))
        part.load_state_dict(state)
    for group, parameter in _adam_parameters(part):
        part.optimizer.state[parameter]["step"] = _step(step, group, parameter)


def _steps_taken(optimizer: Any) -> int:
    """Number of updates, the same on every rank: one that owns no parameter gets it from the others."""
    steps = [-1]
    for part in parts(optimizer):
        steps += [int(part.optimizer.state[parameter]["step"]) for _, parameter in _adam_parameters(part)][:1]
        steps += [int(group["step"]) for group in part.optimizer.param_groups if "step" in group]
    most = torch.tensor(max(steps), device=megabridge.platform.device())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return max(int(most), 0)


def _adam_parameters(part: Any) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """(group, parameter) for everything that torch's own AdamW updates; nothing for other optimizers."""
    if isinstance(part.optimizer, torch.optim.AdamW):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield group, parameter


def _step(value: int, group: Mapping[str, Any], parameter: torch.Tensor) -> torch.Tensor:
    """Makes a step counter like torch.optim.AdamW's: on the parameter's device only if the update reads it there."""
    on_device = bool(group["fused"] or group["capturable"])
    return torch.tensor(float(value), dtype=torch.float32, device=parameter.device if on_device else "cpu")
