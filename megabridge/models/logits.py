"""Gathers the logits of a whole model on every rank, under any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import megabridge.platform as platform
from megabridge.data.vocabulary import check_tokens
from megabridge.errors import ConfigError
from megabridge.native import fp8_scales

from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config


@torch.no_grad()
def gather_logits(chunks: Sequence[Any], tokens: Tensor) -> Tensor:
    """Runs the model forward on `tokens` [b, s] and returns its logits [b, s, vocab_size], fp32, on every rank.

    Every rank calls it with its chunks, which may be wrapped, and with the same tokens; causal attention, no dropout,
    padded vocabulary columns left out. Raises ConfigError for tokens outside the vocabulary, and under context parallelism, for
    which the sequence would have to be cut.
    """
    if parallel_state.get_context_parallel_world_size() > 1:
        raise ConfigError("gather_logits works with context_parallel_size=1 only; build the model without cp for it.")
    config = get_model_config(chunks[0])
    vocab_size = int(get_attr_wrapped_model(chunks[0], "unpadded_vocab_size"))
    check_tokens(tokens, vocab_size, "tokens")
    length = tokens.shape[1]
    tokens = tokens.to(platform.device())
    if config.sequence_parallel:  # the model is causal: tokens on the right don't change those on the left
        tokens = F.pad(tokens, (0, -length % config.tensor_model_parallel_size))
    trained = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with fp8_scales.preserved(chunks):
            parts = _forward(chunks, tokens, config)
    finally:
        for chunk, training in zip(chunks, trained, strict=True):
            chunk.train(training)
    shape = (*tokens.shape, vocab_size)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        local = torch.cat(parts)[: tokens.shape[0]]
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(local)
        logits: Tensor = whole[..., :vocab_size].float().contiguous()
    else:
        logits = torch.empty(shape, dtype=torch.float32, device=tokens.device)
    dist.broadcast(
        logits,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return logits.narrow(1, 0, length)


def _forward(chunks: Sequence[Any], tokens: Tensor, config: Any) -> list[Tensor]:
    """Returns the logits of each micro-batch on the last stage; an empty list elsewhere."""
    # The interleaved schedule takes at least as many micro-batches as there are stages.
    count = parallel_state.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1
    batches = tokens.chunk(count) if tokens.shape[0] % count == 0 else [tokens] * count
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]

    def step(iterator: Iterator[Tensor], chunk: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return chunk(batch, positions.expand_as(batch), None), lambda output, non_loss_data: output

    parts: list[Tensor] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=list(chunks),
        num_microbatches=count,
        seq_length=tokens.shape[1],
        micro_batch_size=batches[0].shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    return parts
