"""The adapter of one native linear: all its Hugging Face linears' A, one below another, and B with the linear's rows."""

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
    """Which rows of a native weight here each adapted linear has: `owned` [rows, linears], of ones and zeros."""

    owned: Tensor

    @classmethod
    def of(cls, part_of_row: Tensor, parts: tuple[int, ...]) -> Self:
        """`part_of_row` [rows] says which part feeds a row (-1: none), `parts` which parts have an adapter."""
        return cls((part_of_row[:, None] == torch.tensor(parts)).float())

    @property
    def linears(self) -> int:
        return self.owned.shape[1]

    def spread(self, rows: Tensor) -> Tensor:
        """[.., rows, r] to [.., rows, linears x r]: each row in its linear's columns, which meet what its A gives; else zero."""
        if self.linears == 1:
            return rows * self.owned
        return (rows[..., None, :] * self.owned[:, :, None]).flatten(-2)


class Adapter(torch.nn.Module):
    """Made as the child `adapter` of the linear that it changes by a forward hook; the linear's weight is [(experts,) out, in].

    lora_A [(experts,) linears x r, in], lora_B [(experts,) out, r], and with DoRA lora_magnitude_vector [(experts,) out], each as
    much as this rank has of the weight's side.
    """

    lora_magnitude_vector: torch.nn.Parameter | None

    def __init__(self, linear: Any, spread: TensorParallelPlacement, rows: AdaptedRows, lora: LoRA) -> None:
        super().__init__()
        weight: Tensor = linear.weight
        self.spread, self.lora = spread, lora
        self.rows = AdaptedRows(rows.owned.to(weight.device, weight.dtype))
        self._weight = [weight]  # in a list: it is no parameter of ours
        *experts, out, width = weight.shape
        settings: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.lora_A = torch.nn.Parameter(torch.zeros(*experts, rows.linears * lora.r, width, **settings))
        self.lora_B = torch.nn.Parameter(torch.zeros(*experts, out, lora.r, **settings))
        self.lora_magnitude_vector = None
        if lora.use_dora:
            self.lora_magnitude_vector = torch.nn.Parameter(torch.zeros(*experts, out, **settings))
        self._mark(len(experts))
        linear.add_module(CHILD, self)
        linear.register_forward_hook(self._add, prepend=True)  # before what the model does with logits

    def _mark(self, dim: int) -> None:
        """Says to megatron-core how each parameter is cut, and which gradients it must add up over the tp ranks."""
        base = vars(self.weight)
        for name, parameter in self.named_parameters():
            is_cut = self.spread.is_cut(name)
            along = dim + 1 if name == "lora_A" else dim
            stride = base["partition_stride"] if is_cut and name != "lora_A" else 1
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, is_cut, along, stride)
            parameter.allreduce = base.get("allreduce", True)  # type: ignore[attr-defined]
            if not is_cut:
                parameter.sequence_parallel = self.spread.sequence_parallel  # type: ignore[attr-defined]

    @property
    def weight(self) -> Tensor:
        """The linear's own weight."""
        return self._weight[0]

    @torch.no_grad()
    def begin(self) -> None:
        """With DoRA, takes the lengths of the weight's rows as they are. The ranks of the weight's group call it together."""
        if self.lora_magnitude_vector is not None and not self.weight.is_meta:
            self.lora_magnitude_vector.copy_(self.norms())

    # ------------------------------------------------------------------ in the model

    def _add(self, linear: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        """The forward hook: `inputs` are the tokens, and how many each expert has where the linear is of several."""
        counts = inputs[1] if self.weight.dim() == 3 else None
        first = output[0] if isinstance(output, tuple) else output
        added = self._change(inputs[0], counts)
        is_gathered = first.shape[-1] > added.shape[-1]  # the output layer's, where whole logits are asked for
        added = self.spread.gathered(added) if is_gathered else added
        if self.lora_magnitude_vector is None:
            first = first + added
        else:
            scale = self._scale()
            scale = self.spread.gathered(scale) if is_gathered else scale
            scale = scale if counts is None else by_token(scale, counts)
            bias = None if counts is not None or linear.skip_bias_add else linear.bias
            first = scale * (first + added) if bias is None else scale * (first - bias + added) + bias
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def _change(self, tokens: Tensor, counts: list[int] | None) -> Tensor:
        """scaling x B A x, [.., rows here]."""
        a = self.spread.parameter("lora_A", self.lora_A)
        b = self.spread.parameter("lora_B", self.lora_B)
        hidden = self.spread.between(_linear(a, self._dropped(tokens), counts))
        return _linear(self.rows.spread(b), hidden * self.lora.scaling, counts)

    def _dropped(self, tokens: Tensor) -> Tensor:
        if not (self.training and self.lora.lora_dropout):
            return tokens
        is_shared = self.spread.side == "column" and not self.spread.sequence_parallel  # by the ranks, who must drop the same
        if is_shared or self.spread.side == "whole":
            forked: Any = contextlib.nullcontext()
        else:
            tracker = get_cuda_rng_tracker()
            forked = tracker.fork(get_expert_parallel_rng_tracker_name()) if self.spread.by_dispatcher else tracker.fork()
        with forked:
            return F.dropout(tokens, self.lora.lora_dropout)

    def _scale(self) -> Tensor:
        """What DoRA multiplies each row by; its norm counts as a constant (section 4.3 of the paper)."""
        assert self.lora_magnitude_vector is not None
        norms = self.norms()
        lengths = self.spread.parameter("lora_magnitude_vector", self.lora_magnitude_vector)
        scale = lengths / torch.where(norms == 0, 1, norms)
        return torch.where(self.rows.owned.any(1), scale, 1)

    # ------------------------------------------------------------------ on the weight

    @torch.no_grad()
    def change(self) -> Tensor:
        """scaling x B A, shaped as the weight here, in fp32 at least."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.rows.spread(self.lora_B).to(dtype) @ self.lora_A.to(dtype) * self.lora.scaling

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The length of each row of W + scaling x B A, [(experts,) out here]. The ranks of the weight's group call it together."""
        squares = (self.weight + self.change()).square().sum(-1)
        if self.spread.side == "row":
            torch.distributed.all_reduce(squares, group=self.spread.group)
        return squares.sqrt().to(self.weight.dtype)

    @torch.no_grad()
    def merged(self, scale: Tensor | None) -> Tensor:
        """The weight that does the same without an adapter; `scale` is `scale()` with DoRA, else None."""
        out = self.weight + self.change()
        return (out if scale is None else out * scale[..., None]).to(self.weight.dtype)

    @torch.no_grad()
    def scale(self) -> Tensor | None:
        """What `merged` takes; the ranks of the weight's group call it together."""
        return None if self.lora_magnitude_vector is None else self._scale()


def _linear(weight: Tensor, tokens: Tensor, counts: list[int] | None) -> Tensor:
    return F.linear(tokens, weight) if counts is None else products(weight, tokens, counts)
