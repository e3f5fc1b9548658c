"""What ranks do with every family: import, logits, export, gradients, a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.checkpoint.hf import native_box, view
from megabridge.conversion.native import survey
from megabridge.conversion.plan import Plan
from megabridge.families import all_families
from megabridge.layers.logits import gather_logits
from tests.cases.convert import bridge_tp, provide
from tests.cases.models import prompt, write_model
from tests.cases.train import _forward_backward, batches

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

LAYERS = 5  # no pipeline size divides it


def tiny_config(architecture: str) -> dict[str, Any]:
    """The config.json of a family's tiny model, with LAYERS layers."""
    family = all_families()[architecture]
    config = {"architectures": [architecture], "model_type": family.model_type, **family.tiny, "dtype": "float32"}
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


def parameters(root: str, architectures: list[str]) -> dict[str, list[str]]:
    """Native names of each model's parameters."""
    return {
        name: [live.name for live in survey(provide(AutoBridge.from_hf_pretrained(Path(root) / name)))] for name in architectures
    }
