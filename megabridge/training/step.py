"""Forward and backward passes of a training step, and validation, on megatron-core's schedules.

The loss is the sum of the unmasked tokens' losses divided by their number in the whole global batch, whatever the number of
data-parallel ranks and micro-batches: megatron-core's `calculate_per_token_loss`. Each micro-batch returns its sum and its
count; `finalize_model_grads` adds the counts of all ranks and divides the gradients by the total, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import megabridge.platform as platform
from megabridge.data.vocabulary import check_batch
from megabridge.errors import ConfigError
from megabridge.models.layers.packed import Packed, packed
from megabridge.native import fp8_scales
from megabridge.parallel.collectives import raise_together_if_cheap

from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_model_config

Batch = dict[str, torch.Tensor]


def prepare(chunks: Sequence[Any], optimizer: Any) -> None:
    """Sets the functions for gradient finalization and loss scaling in the chunks' config; once, before the first step.

    Raises ConfigError for a model without calculate_per_token_loss, which this loop would train wrongly.
    """
    for chunk in chunks:
        config = get_model_config(chunk)
        if not config.calculate_per_token_loss:
            raise ConfigError(
                "provider.calculate_per_token_loss=False would weigh micro-batches, not tokens; set it to True before "
                "provide_distributed_model()."
            )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss if config.fp16 else None
    if chunks[0].ddp_config.overlap_grad_reduce:
        functions = [chunk.no_sync for chunk in chunks]
        get_model_config(chunks[0]).no_sync_func = functions if len(functions) > 1 else functions[0]


def forward_backward(chunks: Sequence[Any], batches: Sequence[Batch], *, forward_only: bool) -> torch.Tensor:
    """Runs `batches` (the micro-batches of this data-parallel rank, each [micro, sequence]) through the pipeline.

    Returns [sum of the unmasked tokens' losses, their number] over all data-parallel ranks, float64, on this rank's device;
    the same on every rank. With `forward_only=False` gradients are left in the buffers, finalized. Every rank calls it.
    Raises ConfigError for tokens or labels outside the vocabulary.
    """
    size = int(get_attr_wrapped_model(chunks[0], "unpadded_vocab_size"))
    with raise_together_if_cheap("looking at a step's tokens"):
        for number, batch in enumerate(batches):
            check_batch(batch, size, f"micro-batch {number} of this rank")
    on_device = [_placed(batch) for batch in batches]
    micro, sequence = on_device[0].tensors["tokens"].shape
    if not forward_only and get_model_config(chunks[0]).num_moe_experts is not None:
        _scale_router_losses(chunks, [placed.tensors for placed in on_device])
    outputs = get_forward_backward_func()(
        forward_step_func=_forward,
        # Every chunk of an interleaved pipeline gets the same micro-batches.
        data_iterator=[iter(on_device) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(on_device),
        seq_length=sequence,
        micro_batch_size=micro,
        forward_only=forward_only,
    )
    return _over_ranks(outputs)


def _scale_router_losses(chunks: Sequence[Any], batches: Sequence[Batch]) -> None:
    """Scales routers' auxiliary losses to the mean over micro-batches, whatever share of the tokens is unmasked.

    megatron-core multiplies them by the number of tokens that a router saw, and the gradients are divided by the number of unmasked
    ones (transformer/moe/router.py): if one token in ten is unmasked, the auxiliary loss would count ten times.
    """
    mask = torch.stack([batch["loss_mask"] for batch in batches])
    share = mask.float().mean().reshape(1)  # all data-parallel ranks have the same number of tokens
    dist.all_reduce(share, group=parallel_state.get_data_parallel_group())
    share /= parallel_state.get_data_parallel_world_size()
    for chunk in chunks:
        config = get_model_config(chunk)
        scale = config.grad_scale_func
        config.moe_grad_scale_func = lambda scale=scale: share if scale is None else scale(share)


@dataclass(frozen=True)
class _Placed:
    """A micro-batch on the device, in the form that the model takes."""

    tensors: Batch
    packed: Packed | None


def _placed(batch: Batch) -> _Placed:
    """Moves a micro-batch to the device, on every pipeline stage; with `documents` its rows are joined into one."""
    tensors = {name: tensor.to(platform.device(), non_blocking=True) for name, tensor in batch.items() if name != "documents"}
    if "documents" not in batch:
        return _Placed(tensors, None)
    if (cp := parallel_state.get_context_parallel_world_size()) > 1:
        raise ConfigError(f"parallel.cp={cp} can't cut packed rows; set data.packing=false, or parallel.cp=1.")
    documents = packed(batch["documents"], tensors["position_ids"])
    return _Placed({name: tensor.reshape(1, -1) for name, tensor in tensors.items()}, documents)


def _forward(batches: Iterator[_Placed], model: Any) -> tuple[torch.Tensor, Any]:
    placed = next(batches)
    batch = placed.tensors
    if parallel_state.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(batch)
    settings: dict[str, Any] = {} if placed.packed is None else {"packed_seq_params": placed.packed}
    if get_model_config(model).mtp_num_layers:  # multi-token prediction has a loss of its own inside the model
        settings["loss_mask"] = batch["loss_mask"]
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **settings)
    return output, partial(_loss, batch["loss_mask"])


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (sum to differentiate, number of tokens, both for the log), from `losses` and `mask`, both [micro, sequence]."""
    total = (losses.float() * mask).sum()
    count = mask.sum()
    return total, count.to(torch.int), torch.stack([total.detach().double(), count.double()])


def _over_ranks(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sums over micro-batches and data-parallel ranks on the last stage, then broadcasts to the other stages."""
    zeros = torch.zeros(2, dtype=torch.float64, device=platform.device())
    totals = torch.stack(list(outputs)).sum(0) if outputs else zeros
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(totals, src=source, group=parallel_state.get_pipeline_model_parallel_group())
    return totals


def validate(chunks: Sequence[Any], batches: Sequence[Batch], *, micro_batch_size: int, seq_length: int) -> tuple[float, int]:
    """Returns (mean loss over all unmasked tokens, their number) for the `batches` of all data-parallel ranks.

    Every rank calls it with its own batches; ranks with fewer are filled up with fully masked ones. Raises ConfigError where no
    token is unmasked.
    """
    # A filler has the shape of the others, because pipeline stages don't exchange shapes.
    like = batches[0] if batches else _blank(micro_batch_size, seq_length)
    filler = {**like, "loss_mask": torch.zeros_like(like["loss_mask"])}
    filled = [*batches, *[filler] * (_batches_on_every_rank(len(batches)) - len(batches))]
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad(), fp8_scales.preserved(chunks):
        totals = forward_backward(chunks, filled, forward_only=True)
    for chunk, training in zip(chunks, modes, strict=True):
        chunk.train(training)
    total, count = totals.tolist()
    if not count:
        raise ConfigError("the validation batches have no unmasked token; give data more validation samples.")
    return total / count, int(count)


def _batches_on_every_rank(count: int) -> int:
    """The largest number of batches of any rank, rounded up to a multiple that the schedule takes."""
    most = torch.tensor(count, device=platform.device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
    # The interleaved schedule runs whole groups of pp micro-batches (pipeline_parallel/schedules.py).
    group = parallel_state.get_pipeline_model_parallel_world_size() if interleaved else 1
    return max(1, -(-int(most) // group)) * group


def _blank(micro: int, sequence: int) -> Batch:
    tokens = torch.zeros(micro, sequence, dtype=torch.long)
    positions = torch.arange(sequence).expand(micro, -1)
    return {
        "tokens": tokens,
        "labels": tokens,
        "position_ids": positions,
        "loss_mask": torch.zeros(micro, sequence),
    }
