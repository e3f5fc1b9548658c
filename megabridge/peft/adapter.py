"""The adapter module of one native linear: the A matrices of all its Hugging Face linears, concatenated, and B with its rows."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from megabridge.models.layers.experts import by_token, products
from megabridge.peft.linears import TensorParallelPlacement
from megabridge.peft.lora_config import LoRA
from megabridge.peft.rules import CHILD

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name


@dataclass(frozen=True)
class AdaptedRows:
    """The rows of this rank's native weight that each adapted linear has: `owned` [rows, linears], of ones and zeros."""

    owned: Tensor

    @classmethod
    def of(cls, part_of_row: Tensor, parts: tuple[int, ...]) -> Self:
        """From `part_of_row` [rows], the part that feeds each row (-1: none), and the `parts` that have an adapter."""
        return cls((part_of_row[:, None] == torch.tensor(parts)).float())

    @property
    def linears(self) -> int:
        return self.owned.shape[1]

    def block_columns(self, rows: Tensor) -> Tensor:
        """[.., rows, r] to [.., rows, linears x r]: puts each row in the columns of its linear's A, with zeros elsewhere."""
        if self.linears == 1:
            return rows * self.owned
        return (rows[..., None, :] * self.owned[:, :, None]).flatten(-2)


class Adapter(torch.nn.Module):
    """Adds itself to a linear as its child `adapter` and changes its output by a forward hook; the weight is [(experts,) out, in].

    Parameters: lora_A [(experts,) linears x r, in], lora_B [(experts,) out, r], and with DoRA lora_magnitude_vector [(experts,)
    out], each sharded as that dimension of the weight.
    """

    lora_magnitude_vector: torch.nn.Parameter | None

    def __init__(self, linear: Any, placement: TensorParallelPlacement, rows: AdaptedRows, lora: LoRA) -> None:
        super().__init__()
        weight: Tensor = linear.weight
        self.placement, self.lora = placement, lora
        self.rows = AdaptedRows(rows.owned.to(weight.device, weight.dtype))
        self._weight = [weight]  # in a list, so that it is not registered as a parameter of the adapter
        *experts, out, width = weight.shape
        settings: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.lora_A = torch.nn.Parameter(torch.zeros(*experts, rows.linears * lora.r, width, **settings))
        self.lora_B = torch.nn.Parameter(torch.zeros(*experts, out, lora.r, **settings))
        self.lora_magnitude_vector = None
        if lora.use_dora:
            self.lora_magnitude_vector = torch.nn.Parameter(torch.zeros(*experts, out, **settings))
        self._mark(len(experts))
        linear.add_module(CHILD, self)
        linear.register_forward_hook(self._add, prepend=True)  # before the hook that scales and masks logits

    def _mark(self, dim: int) -> None:
        """Tells megatron-core how each parameter is sharded, and which gradients to sum over the tp ranks."""
        base = vars(self.weight)
        for name, parameter in self.named_parameters():
            is_cut = self.placement.is_cut(name)
            along = dim + 1 if name == "lora_A" else dim
            stride = base["partition_stride"] if is_cut and name != "lora_A" else 1
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, is_cut, along, stride)
            parameter.allreduce = base.get("allreduce", True)  # type: ignore[attr-defined]
            if not is_cut:
                parameter.sequence_parallel = self.placement.sequence_parallel  # type: ignore[attr-defined]

    @property
    def weight(self) -> Tensor:
        """The linear's own weight."""
        return self._weight[0]

    @torch.no_grad()
    def initialize_magnitude(self) -> None:
        """With DoRA, sets the magnitudes to the norms of the weight's rows. The ranks of the weight's group call it together."""
        if self.lora_magnitude_vector is not None and not self.weight.is_meta:
            self.lora_magnitude_vector.copy_(self.norms())

    # ------------------------------------------------------------------ in the model

    def _add(self, linear: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        """The forward hook; `inputs` are the tokens, and for stacked experts the number of tokens of each."""
        counts = inputs[1] if self.weight.dim() == 3 else None
        first = output[0] if isinstance(output, tuple) else output
        added = self._delta_output(inputs[0], counts)
        is_gathered = first.shape[-1] > added.shape[-1]  # an output layer that gathers its logits
        added = self.placement.gather_output(added) if is_gathered else added
        if self.lora_magnitude_vector is None:
            first = first + added
        else:
            scale = self._scale()
            scale = self.placement.gather_output(scale) if is_gathered else scale
            scale = scale if counts is None else by_token(scale, counts)
            bias = None if counts is not None or linear.skip_bias_add else linear.bias
            first = scale * (first + added) if bias is None else scale * (first - bias + added) + bias
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def _delta_output(self, tokens: Tensor, counts: list[int] | None) -> Tensor:
        """scaling x B A x, [.., rows of this rank]."""
        a = self.placement.parameter("lora_A", self.lora_A)
        b = self.placement.parameter("lora_B", self.lora_B)
        hidden = self.placement.exchange_hidden(_linear(a, self._dropped(tokens), counts))
        return _linear(self.rows.block_columns(b), hidden * self.lora.scaling, counts)

    def _dropped(self, tokens: Tensor) -> Tensor:
        if not (self.training and self.lora.lora_dropout):
            return tokens
        is_shared = (
            self.placement.side == "column" and not self.placement.sequence_parallel
        )  # the ranks have the same tokens and must drop the same
        if is_shared or self.placement.side == "whole":
            forked: Any = contextlib.nullcontext()
        else:
            tracker = get_cuda_rng_tracker()
            forked = tracker.fork(get_expert_parallel_rng_tracker_name()) if self.placement.by_dispatcher else tracker.fork()
        with forked:
            return F.dropout(tokens, self.lora.lora_dropout)

    def _scale(self) -> Tensor:
        """DoRA's factor of each row; the norm in it is taken as a constant (section 4.3 of the paper)."""
        assert self.lora_magnitude_vector is not None
        norms = self.norms()
        lengths = self.placement.parameter("lora_magnitude_vector", self.lora_magnitude_vector)
        scale = lengths / torch.where(norms == 0, 1, norms)
        return torch.where(self.rows.owned.any(1), scale, 1)

    # ------------------------------------------------------------------ on the weight

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling x B A in the shape of this rank's weight, in fp32 or wider."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.rows.block_columns(self.lora_B).to(dtype) @ self.lora_A.to(dtype) * self.lora.scaling

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The norm of each row of W + scaling x B A, [(experts,) local out]. The ranks of the weight's group call it together."""
        squares = (self.weight + self.delta_weight()).square().sum(-1)
        if self.placement.side == "row":
            torch.distributed.all_reduce(squares, group=self.placement.group)
        return squares.sqrt().to(self.weight.dtype)

    @torch.no_grad()
    def merged(self, scale: Tensor | None) -> Tensor:
        """The weight with the adapter merged in; `scale` is that of `scale()`, None without DoRA."""
        out = self.weight + self.delta_weight()
        return (out if scale is None else out * scale[..., None]).to(self.weight.dtype)

    @torch.no_grad()
    def scale(self) -> Tensor | None:
        """The argument of `merged`. The ranks of the weight's group call it together."""
        return None if self.lora_magnitude_vector is None else self._scale()


def _linear(weight: Tensor, tokens: Tensor, counts: list[int] | None) -> Tensor:
    return F.linear(tokens, weight) if counts is None else products(weight, tokens, counts)
