"""What ranks do with every family: import, logits, export, gradients, a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.checkpoint.hf import native_box, view
from megabridge.conversion.plan import Plan
from megabridge.families import all_families
from megabridge.layers.logits import gather_logits
from tests.cases.convert import bridge_tp, provide
from tests.cases.models import prompt, write_model
from tests.cases.train import _forward_backward, batches

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

LAYERS = 5  # no pipeline size divides it

# Further configs of a family: what its tiny config leaves out.
VARIANTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM:dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 24,
    },
    "LlamaForCausalLM:fewer": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "num_key_value_heads": 1},
    "Qwen3ForCausalLM:windows": {
        "use_sliding_window": True, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"],
        "num_key_value_heads": 2,
    },
    "Olmo2ForCausalLM:fewer": {"num_key_value_heads": 2},
    "CohereForCausalLM:fewer": {"num_key_value_heads": 2},
    "CohereForCausalLM:plain": {"use_qk_norm": False, "attention_bias": False},
    "StableLmForCausalLM:sequential": {"use_parallel_residual": False, "qk_layernorm": False, "use_qkv_bias": False},
    "GPTNeoXForCausalLM:sequential": {"use_parallel_residual": False},
    "Phi3ForCausalLM:plain": {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "GraniteForCausalLM:untied": {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    "Exaone4ForCausalLM:full": {"sliding_window": None, "layer_types": ["full_attention"]},
    "SmolLM3ForCausalLM:full": {"use_sliding_window": False, "sliding_window": None, "no_rope_layers": [1, 1, 1, 0]},
}  # fmt: skip


def tiny_config(architecture: str) -> dict[str, Any]:
    """The config.json of a family's tiny model, or of one of VARIANTS, with LAYERS layers."""
    name = architecture.partition(":")[0]
    family = all_families()[name]
    changes = VARIANTS.get(architecture, {})
    config = {"architectures": [name], "model_type": family.model_type, **family.tiny, **changes, "dtype": "float32"}
    config["pad_token_id"] = None  # transformers' embedding gives the padding token's row no gradient
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = LAYERS
    for key in ("layer_types", "no_rope_layers"):
        if key in config:
            config[key] = (config[key] * LAYERS)[:LAYERS]
    return config


def make(root: str, architectures: list[str]) -> None:
    """Tiny models with random weights; transformers' logits of a prompt, and loss and gradients of a batch."""
    from transformers import AutoModelForCausalLM

    for architecture in architectures:
        config = tiny_config(architecture)
        # Zero-centred norms around 0, and logits of moderate size: where a softcap saturates, nothing can be seen.
        folder = write_model(Path(root) / architecture, config, seed=3, std=0.1 if "Gemma" in architecture else 0.2)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits = model(prompt(config["vocab_size"])).logits
        rows = batches(0, config["vocab_size"])
        out = model(rows[:, :-1]).logits
        torch.nn.functional.cross_entropy(out.flatten(0, 1), rows[:, 1:].flatten()).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save({"logits": logits, "gradients": gradients}, folder / "reference.pt")


def battery(root: str, out: str, architectures: list[str], steps: int) -> dict[str, dict[str, Any]]:
    """Of each model: relative differences of logits and gradients from transformers', the export, losses of `steps` steps."""
    return {name: _battery(Path(root) / name, Path(out) / name, steps, number) for number, name in enumerate(architectures)}


def _battery(source: Path, target: Path, steps: int, number: int) -> dict[str, Any]:
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge, wrap_with_ddp=True, sequence_parallel=number % 2 == 1 and bridge_tp() > 1)
    reference = torch.load(source / "reference.pt")
    logits, expected = gather_logits(model, prompt(bridge.config["vocab_size"])), reference["logits"]
    export = bridge.save_hf_pretrained(model, target, show_progress=False)
    seen: dict[str, Any] = {
        "logits": ((logits - expected).abs().max() / expected.abs().max()).item(),
        "spread": (expected.std() / expected.abs().max()).item(),
        "mismatched": export.mismatched,
    }
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0, use_distributed_optimizer=True), model
    )
    losses = []
    for step in range(max(steps, 1)):
        for chunk in model:
            chunk.zero_grad_buffer()
        losses.append(_forward_backward(model, batches(0, bridge.config["vocab_size"])))
        if step == 0:
            seen["gradients"] = _gradients(bridge.plan(model), reference["gradients"])
        if steps:
            optimizer.step()
    return {**seen, "losses": losses}


def _gradients(plan: Plan, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The tensors whose gradient, on this rank, is off by more than 1e-3 of that tensor's largest; and how many were compared."""
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    wrong: dict[str, float] = {}
    for item in plan.items:
        for transfer in item.transfers:
            name = item.hf[transfer.part]
            theirs = expected[{"embed_out.weight": "lm_head.weight"}.get(name, name)]  # in memory transformers 5 calls it so
            box = view(theirs, transfer.hf_view())
            ours = native_box(item.live.parameter.main_grad, transfer)
            largest = float(theirs.abs().max())
            distance = float((ours - box).abs().max()) / max(largest, 1e-4 * scale)
            if distance > 1e-3:
                wrong[item.hf[transfer.part]] = distance
    return wrong


def generations(folders: list[str]) -> list[list[int]]:
    """32 tokens that transformers generates greedily from each folder."""
    from transformers import AutoModelForCausalLM

    out = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokens = model.generate(prompt(131, batch=1, length=8), max_new_tokens=32, min_new_tokens=32, do_sample=False)
        out.append(tokens[0, 8:].tolist())
    return out
