"""Throughput metrics: tokens/s, model TFLOP/s per device, MFU, memory. docs/training.md states the formulas.

The FLOPs of a token are counted from the whole model's Hugging Face shapes, so that they are the same under every layout: 2 per
weight of a matrix for the forward pass, 2 for the gradient of its input, 2 for its own gradient if it is trained. Recomputation and
the lookup of embeddings are not counted; of the experts those that a token is routed to are.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Container, Sequence
from math import prod
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

import megabridge.platform as platform
from megabridge.conversion.plan import Plan
from megabridge.data import Batch
from megabridge.layouts import devices
from megabridge.training.freezing import frozen_names

from megatron.core import parallel_state
from megatron.core.transformer.utils import is_layer_window_attention
from megatron.core.utils import get_model_config

GIB: Final = 2**30
PEAKS: Final[tuple[tuple[str, float], ...]] = (
    ("GB300", 2500e12),
    ("B300", 2250e12),
    ("GB200", 2500e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("V100", 125e12),
)
"""(part of a device's name, its dense BF16 or FP16 matrix FLOP/s), from the vendors' data sheets, of devices that
layouts/devices.yaml doesn't know. Of all names that fit the longest is taken: an A100 has A10 in its name, a GB200 B200."""


def peak(device: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of a device of this name with 16-bit matrices; None for a device that isn't in the table, and for FP32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    known = ((part, figures["tflops_16bit"] * 1e12) for figures in devices.known().values() for part in figures["names"])
    fitting = [(len(name), flops) for name, flops in (*PEAKS, *known) if name in device]
    return max(fitting)[1] if fitting else None


def flops_per_token(plan: Plan, config: Any, *, seq_length: int, frozen: Container[str] = ()) -> float:
    """Floating-point operations of a training step per token of a sequence of `seq_length`, of the whole model.

    `config` is its TransformerConfig; `frozen` are native names of parameters that are not trained.
    """
    return _matrices(plan, config, frozen) + 3 * _attention(config, seq_length)


def _matrices(plan: Plan, config: Any, frozen: Container[str]) -> float:
    """What every token costs, wherever it stands."""
    native = {name: sources[0].native for name, sources in plan.sources.items()}
    is_tied = "output_layer.weight" not in native.values()
    heads = 1 + (config.mtp_num_layers or 0)  # multi-token prediction passes through the output layer once more for each depth
    total = 0.0
    for name, spec in plan.tensors.items():
        where, count = native[name], float(prod(spec.shape))
        if len(spec.shape) < 2 or where.startswith("embedding.position"):
            continue
        if where.startswith("embedding.word"):
            count *= heads if is_tied else 0
        elif where == "output_layer.weight":
            count *= heads
        elif ".experts." in where:
            count *= config.moe_router_topk / config.num_moe_experts
        total += count * (4 if where in frozen else 6)
    return total


def _attention(config: Any, seq_length: int) -> float:
    """Forward FLOPs per token of the scores and their product with the values; causal, so over half of the sequence on average."""
    if config.multi_latent_attention:
        widths = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
    else:
        widths = 2 * config.kv_channels
    per_position = 2.0 * config.num_attention_heads * widths
    total = 0.0
    for layer in range(1, config.num_layers + (config.mtp_num_layers or 0) + 1):
        seen = seq_length
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer):
            seen = min(seq_length, config.window_size[0] + 1)
        total += per_position * (seen - seen * seen / (2 * seq_length))
    return total


class Clock:
    """Rates between two logged steps, without the time of validation and saves. Padding is no token."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._model = get_model_config(chunks[0])
        self._flops: float | None = None
        self._attention: dict[int, float] = {}
        name = "" if platform.is_cpu() else torch.cuda.get_device_name()
        self._peak = peak(name, self._model.params_dtype)
        self.start(0)

    def measure(self, plan: Plan) -> None:
        """Counts the FLOPs of a token, without which TFLOP/s and MFU are left out. Every rank calls it."""
        self._flops = _matrices(plan, self._model, frozen_names(plan.items))

    def start(self, step: int) -> None:
        """Starts measuring, at `step`."""
        self._step, self._since = step, time.perf_counter()
        self._tokens, self._places, self._scores = 0, 0, 0.0

    def count(self, batches: Sequence[Batch]) -> None:
        """Adds the micro-batches of a step on this rank."""
        for batch in batches:
            rows, width = batch["tokens"].shape
            lengths = batch["lengths"].tolist() if "lengths" in batch else [width] * rows
            self._tokens += sum(lengths)
            self._places += rows * width
            self._scores += sum(length * self._attention_at(length) for length in lengths)

    def _attention_at(self, length: int) -> float:
        """`_attention` of a row of `length` tokens, per token."""
        if length not in self._attention:
            self._attention[length] = _attention(self._model, length) if length else 0.0
        return self._attention[length]

    def skip(self, seconds: float) -> None:
        """Excludes `seconds` from the measured time."""
        self._since += seconds

    def rates(self, step: int) -> dict[str, float]:
        """Metrics of the steps since the last call, with the memory of the rank that uses most. Every rank calls it."""
        steps, whole = max(step - self._step, 1), time.perf_counter() - self._since
        tokens, places, scores = self._over_ranks().tolist()
        self.start(step)
        rates = {
            "train/step_seconds": whole / steps,
            "train/tokens_per_second": tokens / whole,
            "train/padding": 1 - tokens / max(places, 1),
        }
        if self._flops is not None:
            achieved = (self._flops * tokens + 3 * scores) / whole / dist.get_world_size()
            rates["train/tflops_per_device"] = achieved / 1e12
            if self._peak is not None:
                rates["train/mfu"] = achieved / self._peak
        rates["train/memory_gib"] = _most_memory() / GIB
        return rates

    def _over_ranks(self) -> Tensor:
        """[tokens, places, operations of scores] since `start`, over all data-parallel ranks."""
        sums = torch.tensor([self._tokens, self._places, self._scores], dtype=torch.float64, device=platform.device())
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        return sums


def _most_memory() -> int:
    """Largest memory of any rank in bytes: on CUDA the peak of allocated memory since the last call, else that of the process."""
    if platform.is_cpu():
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        used = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    most = torch.tensor(used, dtype=torch.int64, device=platform.device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
