"""What the ranks of tests/planning/test_memory.py run: what is expected, and what is held in truth."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config.schema import typed
from megabridge.planning.memory import expected_memory
from megabridge.training import build, build_optimizer, ddp_settings, step

from megatron.core.dist_checkpointing.dict_utils import nested_values


def expected(values: dict[str, Any]) -> list[dict[str, int]]:
    """By stage, in a process without groups."""
    config = typed(values)
    bridge = AutoBridge.from_hf_config(config.model.hf, dtype=config.model.dtype)
    return [asdict(one) for one in expected_memory(config, bridge, build.provider(config, bridge))]


def held(values: dict[str, Any]) -> dict[str, int]:
    """On this rank, in one training step of random tokens."""
    config = typed(values)
    bridge = AutoBridge.from_hf_config(config.model.hf, dtype=config.model.dtype)
    provider = build.provider(config, bridge)
    chunks = provider.provide_distributed_model(ddp_config=ddp_settings(config.optimizer))
    optimizer, _ = build_optimizer(chunks, config.optimizer, config.scheduler, steps=1)
    step.prepare(chunks, optimizer)
    recipe = config.recipe
    dp = torch.distributed.get_world_size() // (config.parallel.tp * config.parallel.pp)
    count = recipe.global_batch_size // recipe.micro_batch_size // dp
    live = Live(chunks)
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda box: box.tensor):
        step.forward_backward(chunks, [_batch(config, number) for number in range(count)], forward_only=False)
    optimizer.step()
    states = [part.optimizer.state for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    tensors = [tensor for state in states for tensor in nested_values(dict(state)) if isinstance(tensor, torch.Tensor)]
    masters = [
        tensor
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        for group in part.optimizer.param_groups
        for tensor in group["params"]
    ]
    own = {parameter.untyped_storage()._cdata for chunk in chunks for parameter in chunk.parameters()}
    return {
        "parameters": sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters()),
        "gradients": sum(
            buffer.grad_data.nbytes for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
        ),
        "optimizer": sum(tensor.nbytes for tensor in tensors if tensor.dim())
        + sum(tensor.nbytes for tensor in masters if tensor.untyped_storage()._cdata not in own),
        "activations": live.peak,
    }


def _batch(config: Any, number: int) -> dict[str, torch.Tensor]:
    shape = config.recipe.micro_batch_size, config.recipe.seq_length
    tokens = torch.randint(0, config.model.hf["vocab_size"], shape, generator=torch.Generator().manual_seed(number))
    positions = torch.arange(shape[1]).expand(shape)
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "position_ids": positions, "loss_mask": torch.ones(shape)}


class Live:
    """Bytes of the storages that autograd keeps at a time, each once, without those of parameters, and the most of them."""

    def __init__(self, chunks: list[Any]) -> None:
        self.own = {parameter.untyped_storage()._cdata for chunk in chunks for parameter in chunk.parameters()}
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Box:
        return Box(tensor, self)

    def change(self, storage: torch.UntypedStorage, by: int) -> None:
        key = storage._cdata
        if key in self.own:
            return
        before = self.holders.get(key, 0)
        self.holders[key] = before + by
        if 0 in (before, before + by):
            self.now += by * storage.nbytes()
            self.peak = max(self.peak, self.now)


class Box:
    """A tensor that is kept until its backward pass is done."""

    def __init__(self, tensor: torch.Tensor, live: Live) -> None:
        self.tensor, self.live = tensor, live
        live.change(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.live.change(self.tensor.untyped_storage(), -1)
