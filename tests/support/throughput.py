"""What the ranks of tests/training/test_throughput.py run."""

from __future__ import annotations

from typing import Any

import torch

from megabridge.conversion.parameters import collect_parameters
from megabridge.conversion.plan import make_plan
from megabridge.families import all_families
from megabridge.models.provider import ModelProvider
from megabridge.training.throughput import Clock, _attention, flops_per_token, peak
from tests.support import tiny

SIZES = {**tiny.NATIVE, "num_layers": 2}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "moe_grouped_gemm": True}


def counted() -> dict[str, float]:
    """FLOPs per token of tiny models, with a sequence of 16."""
    return {
        "dense": _count("LlamaForCausalLM"),
        "untied": _count("LlamaForCausalLM", share_embeddings_and_output_weights=False),
        "frozen_mlp": _count("LlamaForCausalLM", frozen=("linear_fc1.weight", "linear_fc2.weight")),
        "experts": _count("MixtralForCausalLM", **EXPERTS),
        "windows": _count("MistralForCausalLM", window_size=(3, 0)),
    }


def _count(family: str, *, frozen: tuple[str, ...] = (), **settings: Any) -> float:
    native = {**SIZES, **settings}
    provider = ModelProvider(native, family_name=family)
    provider.finalize()
    chunks = provider.provide_distributed_model(wrap_with_ddp=False)
    plan = make_plan(all_families()[family], native, collect_parameters(chunks))
    names = {sources[0].native for sources in plan.sources.values()}
    return flops_per_token(
        plan, provider.config, seq_length=16, frozen={name for name in names if name.endswith(frozen)} if frozen else ()
    )


def padded() -> tuple[dict[str, float], dict[int, float]]:
    """The rates after one step, a token's matrices taken for 100 operations, and what attention costs a token by the row's length."""
    chunks = tiny.model()
    clock = Clock(chunks)
    clock._flops = 100.0
    clock.start(4)
    row = {"tokens": torch.zeros(2, 8, dtype=torch.long)}
    clock.count([{**row, "lengths": torch.tensor(lengths)} for lengths in ([3, 5], [8, 0])])
    return clock.rates(5), {length: _attention(clock._model, length) for length in (3, 5, 8)}


def peaks() -> list[float | None]:
    """Of names as torch gives them."""
    half = torch.bfloat16
    known = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA GeForce GTX 1080")
    return [*(peak(name, half) for name in known), peak("NVIDIA H100 80GB HBM3", torch.float32)]
