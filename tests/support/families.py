"""What ranks do with every family: import, logits, export, gradients, a few steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge, platform
from megabridge.config import schema
from megabridge.conformance import check_family, tiny_model
from megabridge.conformance.findings import problems_of
from megabridge.families import all_families
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.parallel import process_groups
from tests.support import steady
from tests.support.convert import provide
from tests.support.train import _forward_backward, batches

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

# Further configs of a family: what its tiny config leaves out.
VARIANTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM:dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 24,
    },
    "LlamaForCausalLM:fewer": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "num_key_value_heads": 1},
    "Qwen3ForCausalLM:windows": {
        "use_sliding_window": True, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_key_value_heads": 2,
    },
    "Olmo2ForCausalLM:fewer": {"num_key_value_heads": 2},
    "CohereForCausalLM:fewer": {"num_key_value_heads": 2},
    "CohereForCausalLM:plain": {"use_qk_norm": False, "attention_bias": False},
    "StableLmForCausalLM:sequential": {"use_parallel_residual": False, "qk_layernorm": False, "use_qkv_bias": False},
    "GPTNeoXForCausalLM:sequential": {"use_parallel_residual": False},
    "Phi3ForCausalLM:plain": {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "GraniteForCausalLM:untied": {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    "Exaone4ForCausalLM:full": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "GptOssForCausalLM:clamped": {"swiglu_limit": 0.3},
    "DeepseekV2ForCausalLM:greedy": {
        "topk_method": "greedy", "q_lora_rank": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "DeepseekV3ForCausalLM:plain": {"norm_topk_prob": False, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
    "Qwen2MoeForCausalLM:plain": {
        "layer_types": None, "max_window_layers": 3, "qkv_bias": False, "norm_topk_prob": True, "mlp_only_layers": [],
    },
    "Qwen3MoeForCausalLM:windows": {
        "use_sliding_window": True, "sliding_window": 12, "norm_topk_prob": False, "attention_bias": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [0, 3], "tie_word_embeddings": True,
    },
    "OlmoeForCausalLM:normalised": {"norm_topk_prob": True, "attention_bias": False},
    "PhimoeForCausalLM:plain": {
        "architectures": ["PhiMoEForCausalLM"],
        "attention_bias": False, "lm_head_bias": False, "sliding_window": None, "original_max_position_embeddings": None,
        "router_jitter_noise": 0.01, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "HunYuanMoEV1ForCausalLM:lists": {
        "moe_topk": [2] * 4, "num_shared_expert": [1] * 4, "moe_intermediate_size": [48] * 4, "tie_word_embeddings": False, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "SmolLM3ForCausalLM:full": {"use_sliding_window": False, "sliding_window": None, "no_rope_layers": [1, 1, 1, 0]},
    "GptOssForCausalLM:plain": {"attention_bias": False, "num_key_value_heads": 1, "layer_types": ["full_attention"] * 4},
    "Glm4MoeForCausalLM:plain": {
        "attention_bias": False, "use_qk_norm": False, "norm_topk_prob": False, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
        "first_k_dense_replace": 2,
    },
    "Dots1ForCausalLM:full": {
        "norm_topk_prob": True, "sliding_window": None, "layer_types": ["full_attention"] * 4, "attention_bias": False,
    },
    "MiniMaxM2ForCausalLM:legacy": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rotary_dim": 8, "num_key_value_heads": 1,
    },
    "Ernie4_5_MoeForCausalLM:interval": {"moe_layer_interval": 2, "moe_num_shared_experts": 0, "tie_word_embeddings": False},
    "Llama4ForCausalLM:plain": {
        "moe_layers": None, "interleave_moe_layer_step": 2, "no_rope_layers": None, "no_rope_layer_interval": 2, "layer_types": None,
        "use_qk_norm": False, "attn_temperature_tuning": False, "attention_bias": False, "num_key_value_heads": 1,
    },
    "ExaoneMoeForCausalLM:plain": {"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
}  # fmt: skip


def _has_experts(name: str) -> bool:
    family = all_families()[name.partition(":")[0]]
    return "num_moe_experts" in family.native(family.tiny)


MIXTURES = sorted(name for name in {*all_families(), *VARIANTS} if _has_experts(name))


def tiny_config(architecture: str) -> dict[str, Any]:
    """The config.json of a family's tiny model, or of one of VARIANTS."""
    family = all_families()[architecture.partition(":")[0]]
    changed = replace(family, tiny={**family.tiny, **VARIANTS.get(architecture, {})})
    return tiny_model.tiny_config(changed, check_family.LAYERS)


def make(root: str, architectures: list[str]) -> dict[str, int]:
    """Tiny models: random weights, and what transformers computes with them. The seed of each.

    Mixtures have the first seed with which their routing is steady.
    """
    return {name: next(seed for seed in range(3, 30) if _is_made(Path(root) / name, name, seed)) for name in architectures}


def _is_made(folder: Path, name: str, seed: int) -> bool:
    tiny_model.write_tiny_model(folder, tiny_config(name), all_families()[name.partition(":")[0]], ranks=4, seed=seed)
    if name not in MIXTURES or not platform.is_cpu():  # on a GPU one process is compared with transformers, not with other layouts
        return True
    reference = tiny_model.read_reference(folder)
    return steady.is_model_steady(folder, reference.prompt, reference.rows[:, :-1])


def checks(root: str, out: str, architectures: list[str]) -> list[str]:
    """What fails of each model's checks under the running layout, every other one with sequence parallelism. Exports stay in `out`."""
    topology = process_groups.current()
    assert topology is not None
    problems = []
    for number, name in enumerate(architectures):
        layout = ParallelLayout(topology, sequence_parallel=topology.tp > 1 and (number % 2 == 1 or name in MIXTURES))
        values = schema.typed({"model": {"name": "tiny"}, "run_dir": out})
        config = layout.config(check_family.tiny_model_config(values, Path(root) / name))
        with steady.watched() as routed:
            found = check_family.check_tiny_model(config, layout, Path(root) / name, Path(out) / name)
        assert all(routed), f"{name}: a router is near a tie"
        assert [finding.what for finding in found] == ["bijection", "bytes", "logits", "gradients"]
        problems += [f"{name}: {line}" for line in problems_of(found)]
    return problems


def losses(root: str, architectures: list[str], steps: int) -> dict[str, list[float]]:
    """Of each model, the loss of one batch over `steps` steps."""
    return {name: _losses(Path(root) / name, steps) for name in architectures}


def _losses(source: Path, steps: int) -> list[float]:
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge, wrap_with_ddp=True)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0, use_distributed_optimizer=True), model
    )
    out = []
    for _ in range(steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        out.append(_forward_backward(model, batches(0, bridge.source.config["vocab_size"]), micro=4))
        optimizer.step()
    return out


def save_native(root: str, out: str, architectures: list[str]) -> None:
    """Writes each model's native checkpoint under the running layout."""
    for name in architectures:
        bridge = AutoBridge.from_hf_pretrained(Path(root) / name)
        bridge.save_megatron_model(_provide_mixture(bridge), Path(out) / name)


def export_native(native: str, out: str, architectures: list[str]) -> None:
    """Exports each model from its native checkpoint under the running layout."""
    for name in architectures:
        bridge = AutoBridge.from_auto_config(Path(native) / name)
        model = _provide_mixture(bridge, load_weights=False)
        bridge.load_native_weights(model, Path(native) / name)
        bridge.save_hf_pretrained(model, Path(out) / name, show_progress=False)


def _provide_mixture(bridge: AutoBridge, *, load_weights: bool = True) -> list[torch.nn.Module]:
    topology = process_groups.current()
    assert topology is not None
    return provide(bridge, wrap_with_ddp=False, load_weights=load_weights, sequence_parallel=topology.tp > 1)
