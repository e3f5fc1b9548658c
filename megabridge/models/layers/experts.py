"""The experts of one rank as stacked weights: torch's grouped_mm on CUDA, one matrix product after another elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, override

import torch
import torch.nn.functional as F
from torch import Tensor

from megabridge.config.layout_rules import expert_cut_problems
from megabridge.errors import ConfigError, listed
from megabridge.models.layers.parameters import empty

from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule


class StackedLinear(torch.nn.Module):
    """Stacked weights [experts, out, in] and biases [experts, out] of one linear of all local experts, cut along `cut` over etp."""

    bias: torch.nn.Parameter | None

    def __init__(
        self, shape: tuple[int, int, int], config: Any, *, init: Callable[[Tensor], Any], cut: int, stride: int, bias: bool,
        etp: int, reduces_with_dense: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = empty(config, *shape)
        self.bias = empty(config, *shape[:2]) if bias else None
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)
        if config.perform_initialization:
            on_meta = self.weight.is_meta
            forked = contextlib.nullcontext() if on_meta else get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())
            with forked:
                for expert in self.weight:
                    init(expert)
        for parameter in self.parameters():
            is_cut = etp > 1 and cut < parameter.dim()
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, is_cut, cut, stride)
            parameter.allreduce = reduces_with_dense  # type: ignore[attr-defined]  # False: over the experts' replicas

    @override
    def forward(self, tokens: Tensor, counts: list[int]) -> Tensor:
        """Multiplies tokens [n, in], of which `counts[i]` go to expert i, into [n, out], without the bias."""
        return products(self.weight, tokens, counts)


class GroupedExperts(MegatronModule):  # type: ignore[misc]
    """The experts of a MoELayer. Takes the arguments of megatron-core's ExpertsBuilder.

    Under expert tensor parallelism a rank has a share of every expert's hidden width; the token dispatcher gathers the tokens and
    sums the ranks' outputs.
    """

    def __init__(
        self, num_local_experts: int, config: Any, *, pg_collection: Any, name: str | None = None, **_: object
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        self.count = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        etp, width = self.tp_group.size(), config.moe_ffn_hidden_size
        if problems := expert_cut_problems(etp, width, has_biases=config.add_bias_linear):
            raise ConfigError(listed(problems))
        sections = 2 if config.gated_linear_unit else 1
        shared = {
            "bias": config.add_bias_linear,
            "etp": etp,
            "reduces_with_dense": self.ep_group.size() == 1 and etp == pg_collection.tp.size(),
        }
        self.linear_fc1 = StackedLinear(
            (num_local_experts, sections * width // etp, config.hidden_size),
            config, init=config.init_method, cut=1, stride=sections, **shared,
        )  # fmt: skip
        self.linear_fc2 = StackedLinear(
            (num_local_experts, config.hidden_size, width // etp),
            config, init=config.output_layer_init_method, cut=2, stride=1, **shared,
        )  # fmt: skip

    @override
    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Applies the experts to tokens [n, hidden_size], sorted by expert, with router probabilities [n]; keeps the shape."""
        if self.config.moe_apply_probs_on_input:
            tokens = (tokens * probs[:, None]).to(tokens.dtype)
            probs = torch.ones_like(probs)
        counts = tokens_per_expert.tolist()
        hidden = self._activated(self._linear(self.linear_fc1, tokens, counts))
        hidden = (hidden * probs[:, None]).to(tokens.dtype)
        out = self.linear_fc2(hidden, counts)
        if self.linear_fc2.bias is not None:
            out = out + (by_token(self.linear_fc2.bias, counts) * probs[:, None]).to(out.dtype)
        return out, None

    def _linear(self, linear: StackedLinear, tokens: Tensor, counts: list[int]) -> Tensor:
        out: Tensor = linear(tokens, counts)
        return out if linear.bias is None else out + by_token(linear.bias, counts)

    def _activated(self, x: Tensor) -> Tensor:
        config = self.config
        if not config.gated_linear_unit:
            return config.activation_func(x)  # type: ignore[no-any-return]
        gate, up = x.chunk(2, dim=-1)
        if (limit := config.activation_func_clamp_value) is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return config.activation_func(gate) * (up + config.glu_linear_offset)  # type: ignore[no-any-return]

    def backward_dw(self) -> None:
        """Does nothing: the backward pass computes weight gradients too. megatron-core calls it to compute delayed ones."""

    # ------------------------------------------------------------------ native checkpoints

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None) -> dict[str, Any]:
        """Keys and global shapes [experts, out, in] as in SequentialMLP and TEGroupedMLP, so that each reads the others'."""
        out: dict[str, Any] = {}
        for name, parameter in self.named_parameters():
            key = f"{prefix}experts.{name}"
            is_split = self.config.gated_linear_unit and name.startswith("linear_fc1.")
            out[f"{prefix}{name}"] = self._sharded(key, parameter, sharded_offsets, is_split=is_split)
        return out

    def _sharded(self, key: str, parameter: torch.nn.Parameter, above: tuple[Any, ...], *, is_split: bool) -> Any:
        first, etp, index = len(above), self.tp_group.size(), self.tp_group.rank()
        rows = (first, self.ep_group.rank(), self.ep_group.size())
        is_cut = bool(vars(parameter)["tensor_model_parallel"])
        replica = (0, 0 if is_cut else index, self.dp_group.rank())

        def part(key: str, data: Tensor, replica_id: ReplicaId, number: int, total: int, dim: int) -> ShardedTensor:
            offsets = (*above, rows, (first + dim, number, total)) if total > 1 else (*above, rows)
            return ShardedTensor.from_rank_offsets(key, data, *offsets, replica_id=replica_id, prepend_axis_num=first)

        if not is_split:
            dim = vars(parameter)["partition_dim"]
            return part(key, parameter, replica, index, etp if is_cut else 1, dim)

        @torch.no_grad()
        def build(key: str, data: Tensor, replica_id: ReplicaId, flattened_range: Any) -> list[ShardedTensor]:
            gate, up = data.chunk(2, dim=1)
            return [part(key, half, replica_id, index + number * etp, 2 * etp, 1) for number, half in enumerate((gate, up))]

        @torch.no_grad()
        def merge(halves: list[Tensor]) -> Tensor:
            return torch.cat(halves, dim=1)

        return ShardedTensorFactory(key, parameter, build, merge, replica)


def products(weight: Tensor, tokens: Tensor, counts: list[int]) -> Tensor:
    """Multiplies tokens [n, in], of which `counts[i]` go to expert i of weight [experts, out, in], into [n, out]."""
    if _can_group(tokens, weight):
        ends = torch.tensor(counts, device=tokens.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(tokens, weight.transpose(1, 2), offs=ends)
    # unbind: the backward pass of indexing would make a gradient of all experts for each expert
    parts = zip(weight.unbind(), torch.split(tokens, counts), strict=True)
    return torch.cat([F.linear(part, expert) for expert, part in parts])


def by_token(bias: Tensor, counts: list[int]) -> Tensor:
    """The bias of each token's expert, [n, width]."""
    return torch.cat([row.expand(count, -1) for row, count in zip(bias.unbind(), counts, strict=True)])


def _can_group(tokens: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm takes these: bf16 on CUDA, with rows of a multiple of 16 bytes."""
    fits = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    return tokens.is_cuda and tokens.dtype is torch.bfloat16 is weight.dtype and fits and tokens.shape[0] > 0
