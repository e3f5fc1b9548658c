"""Residual connections with norms and factors, and layers with attention and MLP in parallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, override

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class Residual(torch.nn.Module):
    """Replaces megatron-core's bias-dropout-add: residual + dropout(multiplier * norm(x + bias)).

    `norm` builds the norm (None: no norm), whose parameters are named `norm.weight` and `norm.bias` in this module.
    """

    def __init__(self, config: Any, norm: Any, multiplier: float) -> None:
        super().__init__()
        self.norm = None if norm is None else norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.multiplier = multiplier

    @override
    def forward(self, training: bool, fused: bool) -> Add:
        """Returns the function that adds; `fused` is for megatron-core's own kernel and ignored here."""

        def add(output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            x, bias = output
            if bias is not None:
                x = x + bias
            if self.norm is not None:
                x = self.norm(x)
            if self.multiplier != 1.0:
                x = x * self.multiplier
            return residual + F.dropout(x, dropout, training)

        return add


class ParallelLayer(TransformerLayer):  # type: ignore[misc]
    """A layer whose MLP reads the layer's input, as the attention does, instead of the attention's output.

    Without a `pre_mlp_layernorm` in the spec (IdentityOp) both read through `input_layernorm`.
    """

    @override
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[s, b, hidden_size] to the same; the arguments are TransformerLayer's."""
        attended, _ = self._forward_attention(hidden_states, *args, **kwargs)
        shared = isinstance(self.pre_mlp_layernorm, IdentityOp)
        normed = (self.input_layernorm if shared else self.pre_mlp_layernorm)(hidden_states)
        with self.bias_dropout_add_exec_handler():
            return self.mlp_bda(self.training, False)(self.mlp(normed), attended, self.hidden_dropout), None
