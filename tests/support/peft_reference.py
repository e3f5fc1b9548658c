"""transformers with adapters, written down from PEFT's formulas; and PEFT itself, where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from megabridge.conformance import tiny_model
from tests.support import steady, tiny

PREFIX = "base_model.model."


class Adapted(nn.Module):
    """W x + s B A x, or with a length vector m (W x + s B A x) m / |W + s B A|, bias added after; Conv1D's W is transposed."""

    def __init__(self, base: Any, a: Tensor, b: Tensor, length: Tensor | None, scaling: float) -> None:
        super().__init__()
        self.weight = base.weight.detach() if isinstance(base, nn.Linear) else base.weight.detach().T
        self.bias = None if base.bias is None else base.bias.detach()
        self.a, self.b, self.scaling = nn.Parameter(a), nn.Parameter(b), scaling
        self.length = None if length is None else nn.Parameter(length)

    def merged(self) -> Tensor:
        weight = self.weight + self.scaling * (self.b @ self.a)
        return weight if self.length is None else weight * (self.length / weight.norm(dim=1))[:, None]

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight) + self.scaling * F.linear(F.linear(x, self.a), self.b)
        if self.length is not None:
            out = out * (self.length / (self.weight + self.scaling * (self.b @ self.a)).detach().norm(dim=1))
        return out if self.bias is None else out + self.bias


def adapted_model(base: str, adapter: str) -> tuple[Any, dict[str, Adapted]]:
    """transformers' model of `base` with the adapters of a PEFT folder; everything else frozen."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.requires_grad = False
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    found = {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            stem = PREFIX + module
            length = tensors.get(f"{stem}.lora_magnitude_vector")
            assert (length is not None) == config["use_dora"]
            made = Adapted(model.get_submodule(module), tensors[name], tensors[f"{stem}.lora_B.weight"], length, scaling)
            model.set_submodule(module, made)
            found[module] = made
    return model, found


def logits(base: str, adapter: str, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return adapted_model(base, adapter)[0](tokens).logits


def merged(base: str, adapter: str) -> dict[str, Tensor]:
    """The whole weights of every adapted linear, [out, in], merged."""
    return {name: module.merged().detach() for name, module in adapted_model(base, adapter)[1].items()}


def train(base: str, adapter: str, steps: int, *, with_peft: bool = False) -> list[float]:
    """The losses of AdamW on what tests/support/peft.py trains on, beginning with the adapters in `adapter`."""
    model = peft_model(base, adapter) if with_peft else adapted_model(base, adapter)[0]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=5e-3, betas=(0.9, 0.95), eps=steady.EPSILON)
    losses = []
    for step in range(steps):
        batch = tiny.batch(range(8 * step, 8 * step + 8))
        out = model(batch["tokens"]).logits
        each = F.cross_entropy(out.flatten(0, 1), batch["labels"].flatten(), reduction="none").view_as(batch["loss_mask"])
        loss = (each * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss))
    return losses


def peft_model(base: str, adapter: str) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()


def by_peft(base: str, adapter: str, tokens: Tensor, steps: int) -> dict[str, Any]:
    """What PEFT makes of a folder: logits, merged weights, losses of training on."""
    with torch.no_grad():
        out = peft_model(base, adapter)(tokens).logits
    state = peft_model(base, adapter).merge_and_unload().state_dict()
    return {"logits": out, "merged": state, "losses": train(base, adapter, steps, with_peft=True)}


def stacked(root: str, out: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Of each model's adapters in `out`: PEFT's logits, and how far the merged folder there is from PEFT's own merge."""
    from transformers import AutoModelForCausalLM

    found = {}
    for name in names:
        base, folder = Path(root) / name, Path(out) / name
        with torch.no_grad():
            seen = peft_model(str(base), str(folder / "adapter"))(tiny_model.read_reference(base).prompt).logits
        theirs = peft_model(str(base), str(folder / "adapter")).merge_and_unload().state_dict()
        ours = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).state_dict()
        assert ours.keys() == theirs.keys()
        found[name] = {"logits": seen, "far": max(float((ours[key] - theirs[key]).abs().max()) for key in ours)}
    return found


def begin(base: str, folder: str, tokens: Tensor, **settings: Any) -> Tensor:
    """Writes adapters of random values that PEFT made; returns the logits with them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    made = get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)).eval()
    made.save_pretrained(folder)
    with torch.no_grad():
        return made(tokens).logits


def begun(base: str, root: str, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Adapters that PEFT began in several ways, a folder each in `root`: logits of PEFT's reading, and of what was trained.

    Those that it changed the weights for are in root/plain as they were saved, and in `root` as PEFT converts them.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    found = {}
    for kind in (True, "gaussian", "orthogonal", "mica", "pissa", "olora"):
        torch.manual_seed(5)
        name, folder = str(kind), Path(root) / str(kind)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        config = LoraConfig(init_lora_weights=kind, task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
        made = get_peft_model(model, config).eval()
        is_changed = kind in ("pissa", "olora")
        if is_changed:
            made.peft_config["default"].init_lora_weights = True  # as PEFT's examples save the beginning
            made.save_pretrained(Path(root) / "begun" / name)
            made.peft_config["default"].init_lora_weights = kind
        with torch.no_grad():
            for part, parameter in made.named_parameters():
                if ".lora_" in part:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
            trained = made(tokens).logits
        if is_changed:
            made.save_pretrained(Path(root) / "plain" / name)
            made.save_pretrained(folder, path_initial_model_for_weight_conversion=str(Path(root) / "begun" / name))
        else:
            made.save_pretrained(folder)
        with torch.no_grad():
            found[name] = (peft_model(base, str(folder))(tokens).logits, trained)
    return found
