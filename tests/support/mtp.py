"""What ranks do in the tests of multi-token prediction."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megabridge import AutoBridge
from megabridge.config import schema
from megabridge.conformance import check_family, tiny_model
from megabridge.conformance.findings import problems_of
from megabridge.errors import MegabridgeError
from megabridge.families import all_families
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.parallel import process_groups
from tests.support.convert import provide


def make(folder: str, architecture: str) -> None:
    """A tiny model that has a multi-token-prediction layer: its tensors are in the file, and in the loss and its gradients."""
    family, root = all_families()[architecture], Path(folder)
    config = tiny_model.tiny_config(family, check_family.LAYERS)
    tiny_model.write_tiny_model(root, config, family, ranks=4)
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(5)
    ahead = MtpModel(model, 1)
    for parameter in ahead.layers.parameters():
        parameter.data.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
    ahead.layers[0].mtp_block.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    rows = tiny_model.read_reference(root).rows
    hidden = model.model(rows[:, :-1]).last_hidden_state
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), rows[:, 1:].flatten())
    # The token after next, from the hidden state at a position and the next token; the last position has none.
    positions = torch.arange(rows.shape[1] - 2)[None]
    drafted = ahead.forward_layer(0, hidden[:, :-1], positions, None, input_ids=rows[:, 1:-1])
    second = torch.nn.functional.cross_entropy(model.lm_head(drafted).flatten(0, 1), rows[:, 2:].flatten())
    torch.autograd.backward(loss + 0.1 * second)
    layer = check_family.LAYERS
    own = _published(ahead.layers[0], layer, lambda tensor: tensor.data)
    shared = {
        f"model.layers.{layer}.embed_tokens.weight": "model.embed_tokens.weight",
        f"model.layers.{layer}.shared_head.head.weight": "lm_head.weight",
    }
    file = load_file(root / "model.safetensors")
    save_file(
        {**file, **own, **{copy: file[name].clone() for copy, name in shared.items()}}, root / "model.safetensors", {"format": "pt"}
    )
    with torch.no_grad():
        gradients = _published(
            ahead.layers[0], layer, lambda tensor: tensor.grad if isinstance(tensor, torch.nn.Parameter) else tensor
        )
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(root / tiny_model.GRADIENTS)
    main = load_file(root / tiny_model.GRADIENTS / "model.safetensors")
    save_file({**main, **gradients}, root / tiny_model.GRADIENTS / "model.safetensors", {"format": "pt"})


def make_with(folder: str, architecture: str, key: str, tensor: str) -> None:
    """A tiny model whose config's `key` says that there is such a layer, and whose file has `tensor` of it."""
    family, root = all_families()[architecture], Path(folder)
    tiny_model.write_tiny_model(root, {**tiny_model.tiny_config(family, check_family.LAYERS), key: 1}, family)
    file = load_file(root / "model.safetensors")
    save_file({**file, tensor: torch.arange(6.0).view(2, 3)}, root / "model.safetensors", {"format": "pt"})


def _published(layer: Any, number: int, of: Any) -> dict[str, torch.Tensor]:
    """The tensors of a layer of transformers' MtpModel under their published names."""
    out = {}
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        value, name = of(tensor).clone(), name.removeprefix("mtp_block.")
        prefix = f"model.layers.{number}"
        if name == "mlp.experts.gate_up_proj":
            for expert, both in enumerate(value):
                for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    out[f"{prefix}.mlp.experts.{expert}.{part}_proj.weight"] = half.clone()
        elif name == "mlp.experts.down_proj":
            out |= {f"{prefix}.mlp.experts.{expert}.down_proj.weight": one.clone() for expert, one in enumerate(value)}
        else:
            out[f"{prefix}.{name.replace('post_norm', 'shared_head.norm')}"] = value
    return out


def built(source: str, out: str) -> list[str]:
    """What is wrong of bytes, logits and gradients of a model that was built with its multi-token-prediction layer."""
    topology = process_groups.current()
    assert topology is not None
    layout = ParallelLayout(topology, sequence_parallel=topology.tp > 1)
    values = schema.typed({"model": {"name": "tiny", "provider": {"mtp_num_layers": 1}}, "run_dir": str(Path(out).parent)})
    config = layout.config(check_family.tiny_model_config(values, Path(source)))
    found = check_family.check_tiny_model(config, layout, Path(source), Path(out))
    return problems_of(found) or ([] if len(found) == 4 else ["checks are missing"])


def unequal(source: str, folder: str) -> str:
    """What is said of a file in which the layer's copy of the embedding is another one."""
    shutil.copytree(source, folder)
    file = load_file(Path(folder) / "model.safetensors")
    file[f"model.layers.{check_family.LAYERS}.embed_tokens.weight"].neg_()
    save_file(file, Path(folder) / "model.safetensors", {"format": "pt"})
    try:
        provide(AutoBridge.from_hf_pretrained(folder), mtp_num_layers=1)
    except MegabridgeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def not_built(source: str, out: str) -> list[str]:
    """The model without the layer: what differs of its exports, straight and after a native checkpoint whose source is gone."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    target = Path(out)
    bridge.save_hf_pretrained(model, target / "straight", weight_dtype="source")
    problems = check_family.folder_differences(Path(source), target / "straight")
    bridge.save_hf_pretrained(model, target / "gathered", weight_dtype="source", writer="gather", max_shard_size="300KB")
    problems += check_family.folder_differences(Path(source), target / "gathered")
    bridge.save_megatron_model(model, target / "native")
    again = AutoBridge.from_auto_config(target / "native")
    assert again.source.location is None
    again.save_hf_pretrained(again.load_megatron_model(target / "native"), target / "after", weight_dtype="source")
    problems += check_family.folder_differences(Path(source), target / "after")
    names = [name for name, _ in again.export_hf_weights(model, show_progress=False)]
    assert not any(f".layers.{check_family.LAYERS}." in name for name in names)  # what training doesn't change is not streamed
    return problems
