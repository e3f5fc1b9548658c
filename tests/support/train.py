"""What the ranks of tests/models/test_provider_training.py run: a few optimizer steps on megatron-core's own schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from tests.support import llama

from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

LENGTH = 16
GLOBAL_BATCH = 8


def batches(step: int, vocab_size: int) -> torch.Tensor:
    """The global batch of a step, [GLOBAL_BATCH, LENGTH + 1], the same for every layout."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, vocab_size, (GLOBAL_BATCH, LENGTH + 1), generator=generator)


def train(cases: list[tuple[dict[str, Any], dict[str, Any]]], steps: int) -> list[dict[str, Any]]:
    """Per (shape, provider settings): loss and gradient norm of each step, and the first gradients beside HF's."""
    return [_train(shape, settings, steps) for shape, settings in cases]


def _train(shape: dict[str, Any], settings: dict[str, Any], steps: int) -> dict[str, Any]:
    hf = llama.hf_model(shape)
    provider, chunks = llama.provided(shape, settings, hf, wrap_with_ddp=True)
    adam = OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(adam, chunks)
    result: dict[str, Any] = {"loss": [], "grad_norm": [], "gradient": 0.0, "split": provider.split}
    for step in range(steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        result["loss"].append(_forward_backward(chunks, batches(step, provider.vocab_size)))
        if step == 0:
            result["gradient"] = _gradient_difference(chunks, provider.config, hf)
        _, grad_norm, _ = optimizer.step()
        result["grad_norm"].append(float(grad_norm))
    result["hf"] = _hf_step(hf)
    return result


def _forward_backward(chunks: list[Any], batch: torch.Tensor, *, micro: int = 1) -> float:
    """The mean loss of the global batch; micro-batches of `micro` sequences. Equal on all ranks."""
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    own = batch[dp_rank::dp]
    positions = torch.arange(LENGTH).expand(micro, -1)

    def step(iterator: Iterator[torch.Tensor], chunk: Any) -> Any:
        rows = next(iterator)
        losses = chunk(rows[:, :-1], positions, None, labels=rows[:, 1:])
        return losses, lambda output: (output.mean(), {"loss": output.detach().mean()})

    losses = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(own.split(micro)) for _ in chunks] if len(chunks) > 1 else iter(own.split(micro)),
        model=chunks,
        num_microbatches=len(own) // micro,
        seq_length=LENGTH,
        micro_batch_size=micro,
        forward_only=False,
    )
    mean = torch.stack([loss["loss"] for loss in losses]).mean() if losses else torch.zeros(())
    dist.broadcast(
        mean,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
    return float(mean / dp)


def _gradient_difference(chunks: list[Any], config: Any, hf: Any) -> float:
    """The largest difference of any gradient here from transformers'. Only where gradients are not cut over dp."""
    if parallel_state.get_data_parallel_world_size() > 1:
        return 0.0
    _hf_backward(hf)
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters(remove_duplicate=False)}
    worst = 0.0
    for name, offset, parameter in llama.parameters(chunks):
        wanted = llama.shard(llama.native_tensor(name, config, offset, gradients.__getitem__), parameter)
        worst = max(worst, float((parameter.main_grad - wanted).abs().max()))
    return worst


def _hf_backward(hf: Any) -> float:
    rows = batches(0, hf.config.vocab_size)
    hf.zero_grad()
    logits = hf(rows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    return float(loss)


def _hf_step(hf: Any) -> tuple[float, float]:
    """transformers' loss and gradient norm of the first step."""
    loss = _hf_backward(hf)
    norm = torch.linalg.vector_norm(torch.stack([parameter.grad.norm() for parameter in hf.parameters()]))
    return loss, float(norm)
