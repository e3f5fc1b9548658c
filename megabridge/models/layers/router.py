"""Routers choose each token's experts and their weights, as Hugging Face's mixtures of experts do."""

from __future__ import annotations

from typing import Any, Final, override

import torch
import torch.nn.functional as F
from torch import Tensor

import megabridge.platform as platform
from megabridge.models.layer_options import LayerOptions

from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter

_PLAIN: Final = LayerOptions()


class Router(TopKRouter):  # type: ignore[misc]
    """megatron-core's router with those of `LayerOptions`: scores of groups, normalisation, a correction bias with softmax.

    A subclass overrides `select`. Auxiliary losses, token statistics and the bias's update are megatron-core's.
    """

    def __init__(
        self, config: Any, pg_collection: Any = None, is_mtp_layer: bool = False, *, options: LayerOptions = _PLAIN
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.options = options
        if options.router_bias and self.expert_bias is None:
            del self.expert_bias  # a plain attribute until now
            self.register_buffer("expert_bias", torch.zeros(config.num_moe_experts, dtype=torch.float32, device=platform.device()))

    @override
    def gating(self, input: Tensor) -> Tensor:
        """The logits [s, b, num_moe_experts] of hidden states, in moe_router_dtype.

        megatron-core's own product goes through Transformer Engine where that is installed, which computes fp32 in TF32.
        """
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias)

    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (weights, experts), both [tokens, moe_router_topk], for `logits` [tokens, num_moe_experts]; computed in fp32."""
        config, options = self.config, self.options
        scores = logits.float()
        if config.moe_router_score_function == "sigmoid":
            scores = scores.sigmoid()
        elif config.moe_router_pre_softmax:
            scores = scores.softmax(-1)
        choice = scores if self.expert_bias is None else scores + self.expert_bias.float()
        if config.moe_router_group_topk:
            choice = self._within_groups(choice)
        experts = choice.topk(self.topk, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        if config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax:
            weights = weights.softmax(-1)
        if options.router_normalize or (
            options.router_normalize is None and config.moe_router_score_function == "sigmoid" and self.topk > 1
        ):
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=options.router_epsilon)
        if config.moe_router_topk_scaling_factor:
            weights = weights * config.moe_router_topk_scaling_factor
        return weights, experts

    def _within_groups(self, choice: Tensor) -> Tensor:
        """Returns `choice` with -inf for experts whose group is not among the best moe_router_group_topk."""
        groups = choice.view(choice.shape[0], self.config.moe_router_num_groups, -1)
        taken = self.topk // self.config.moe_router_group_topk  # experts that a token takes from each of its groups
        best = {"top2": 2, "max": 1, None: taken}[self.options.router_group_score]
        chosen = groups.topk(best, dim=-1).values.sum(-1).topk(self.config.moe_router_group_topk, dim=-1, sorted=False).indices
        allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, chosen, True)
        return groups.masked_fill(~allowed[..., None], float("-inf")).view_as(choice)

    @override
    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (weights, whether the token goes there), both [tokens, num_moe_experts], for `logits` [s, b, num_moe_experts]."""
        length, batch = logits.shape[:2]
        logits = logits.view(-1, self.config.num_moe_experts)
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding)
        weights, experts = self.select(logits)
        probs = torch.zeros_like(logits).scatter(1, experts, weights.type_as(logits))
        routed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            is_padded = padding is not None
            map_of, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function, padding_mask=padding)
            probs = self._apply_aux_loss(probs, scores, map_of, with_padding_mask=is_padded)
            probs = self._apply_seq_aux_loss(probs, scores, map_of, length, batch, with_padding_mask=is_padded)
            probs = self._apply_global_aux_loss(probs, scores, map_of, with_padding_mask=is_padded)
        self._apply_expert_bias(routed, padding_mask=padding)
        return probs, routed


class SparseMixer(Router):
    """Router of Phi-3.5-MoE: takes one expert after another, each weighted by a softmax over the remaining scores near the best.

    arXiv 2409.12136, as transformers' phimoe does in inference; training chooses the same way, without random sampling.
    """

    @override
    def select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = left = logits.float()
        weights, experts = [], []
        for _ in range(self.topk):
            best, expert = left.max(-1, keepdim=True)
            with torch.no_grad():
                is_far = (best - scores) / torch.maximum(scores.abs(), best) > 2 * self.options.router_jitter
            weights.append(left.masked_fill(is_far, float("-inf")).softmax(-1).gather(-1, expert))
            experts.append(expert)
            left = left.scatter(-1, expert, float("-inf"))
        return torch.cat(weights, -1), torch.cat(experts, -1)
