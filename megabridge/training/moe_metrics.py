"""MoE metrics: auxiliary losses, how evenly routers spread tokens over experts, and correction biases.

Counts stay on the device, in one tensor, from the first forward pass of a logged step until its metrics are read; other steps are
not counted. One all-reduce over all ranks sums everything: each token is counted by one tensor-, context- and data-parallel rank of
the stage that holds the layer, because sequence parallelism splits the tokens that reach a router.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any, Final

import torch
import torch.distributed as dist

import megabridge.platform as platform
from megabridge.conversion.parameters import unwrap

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_model_config

# megatron-core's names of the losses (transformer/moe/router.py) by the kinds in moe_router_load_balancing_type, and ours.
_LOSSES: Final = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
    "z_loss": "z_loss",
}


class MoEMetrics:
    """Counts the routing of `chunks`. Every rank makes one, calls `begin` before each step's forward passes, and `metrics` after a
    logged step, whether it holds experts or not. For a model without experts both do nothing.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.config = get_model_config(chunks[0])
        self._counts_now = False
        self._routers: list[tuple[int, TopKRouter]] = []
        experts = self.config.num_moe_experts
        if experts is None:
            return
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        self._tokens = torch.zeros(layers, experts, dtype=torch.float64, device=platform.device())
        for chunk in chunks:
            for module in unwrap(chunk).modules():
                if isinstance(module, TopKRouter):
                    self._watch(module)

    def _watch(self, router: TopKRouter) -> None:
        row = router.layer_number - 1 + (self.config.num_layers if router.is_mtp_layer else 0)
        self._routers.append((row, router))

        def count(module: Any, inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
            # A pass without gradients is validation, or will be repeated by activation recomputation.
            if self._counts_now and torch.is_grad_enabled():
                self._tokens[row] += outputs[1].detach().sum(0)

        router.register_forward_hook(count)

    def begin(self, *, is_logged: bool) -> None:
        """Resets the counts; the next step is counted only if it `is_logged`."""
        if self.config.num_moe_experts is None:
            return
        self._counts_now = is_logged
        self._tokens.zero_()
        get_moe_metrics_tracker().clear()

    def metrics(self, micro_batches: int) -> dict[str, float]:
        """Returns the step's metrics, the same on every rank; `micro_batches` is the number that each data-parallel rank ran.

        `router/aux_loss` and so on: each loss without its coefficient, the mean over layers. `imbalance`: the tokens of the busiest
        expert over the mean of all experts, between 1 (all equal) and num_moe_experts / moe_router_topk; `entropy`: that of the
        experts' shares of tokens, over its maximum, so that 1 is even; `idle_experts`: the number of experts without a token.
        `bias_min` and `bias_max`: the range of correction biases. With `layer_N`, counted from 0 as in parameters' names, for one
        layer; otherwise the mean over layers, the largest (`imbalance_max`) or the sum (`idle_experts`).
        """
        if self.config.num_moe_experts is None:
            return {}
        names = self._names()
        values = torch.cat([self._tokens, self._losses(names), self._router_flags()], dim=1)
        dist.all_reduce(values)
        rows = values.tolist()
        experts = self.config.num_moe_experts
        stage = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()
        found = [(number, row) for number, row in enumerate(rows) if row[-4]]  # layers that have a router
        out: dict[str, float] = {}
        for place, name in enumerate(names):
            total = sum(row[experts + place] for _, row in found) / len(found)
            out[f"router/{name}"] = total / micro_batches / _repeats(name, stage)
        out |= _balance([(number, row[:experts]) for number, row in found])
        if biased := [row for _, row in found if row[-3]]:
            out["router/bias_min"] = min(row[-2] for row in biased) / stage
            out["router/bias_max"] = max(row[-1] for row in biased) / stage
        return out

    def _names(self) -> list[str]:
        """The losses that this model has, the same on every rank."""
        kinds, weights = self.config.moe_router_load_balancing_type, self.config.moe_aux_loss_coeff
        pairs = zip(kinds, weights, strict=True) if isinstance(kinds, list) else [(kinds, weights)]
        names = [kind for kind, weight in pairs if kind in _LOSSES and weight]
        return names if self.config.moe_z_loss_coeff is None else [*names, "z_loss"]

    def _losses(self, names: Sequence[str]) -> torch.Tensor:
        """The losses that this rank's routers recorded, [layers, names]."""
        entries = get_moe_metrics_tracker().metrics
        out = torch.zeros(len(self._tokens), len(names), dtype=torch.float64, device=self._tokens.device)
        for column, name in enumerate(names):
            if (entry := entries.get(_LOSSES[name])) is not None:
                out[:, column] = entry.values
        return out

    def _router_flags(self) -> torch.Tensor:
        """[layers, 4]: 1 if this rank has the router, 1 if it has a correction bias, and the bias's smallest and largest value."""
        out = torch.zeros(len(self._tokens), 4, dtype=torch.float64, device=self._tokens.device)
        for row, router in self._routers:
            out[row, 0] = 1
            if router.expert_bias is not None:
                out[row, 1] = 1
                out[row, 2], out[row, 3] = router.expert_bias.min(), router.expert_bias.max()
        return out


def _repeats(name: str, stage: int) -> int:
    """Number of times that the sum over the `stage` ranks of a pipeline stage counts a loss."""
    if name == "global_aux_loss":
        return 1  # ranks' shares of one number
    if name == "z_loss":
        return stage  # each rank's own mean
    return int(parallel_state.get_data_parallel_world_size())  # shares over tp and cp; over dp each rank's own batch


def _balance(layers: Sequence[tuple[int, Sequence[float]]]) -> dict[str, float]:
    """Metrics of how evenly tokens were spread over experts, from (layer, tokens by expert)."""
    imbalance, entropy, idle = [], [], 0
    out = {}
    for number, tokens in layers:
        mean = max(sum(tokens) / len(tokens), 1e-9)
        shares = [count / sum(tokens) for count in tokens if count]
        imbalance.append(max(tokens) / mean)
        entropy.append(-sum(share * log(share) for share in shares) / log(max(len(tokens), 2)))
        idle += sum(not count for count in tokens)
        out[f"router/layer_{number}/imbalance"] = imbalance[-1]
    return {
        "router/imbalance": sum(imbalance) / len(imbalance),
        "router/imbalance_max": max(imbalance),
        "router/entropy": sum(entropy) / len(entropy),
        "router/idle_experts": float(idle),
        **out,
    }
