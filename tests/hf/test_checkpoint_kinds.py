"""What is said of a folder whose tensors aren't those that its config asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megabridge.errors import CheckpointError
from megabridge.hf.checkpoint_kinds import described
from megabridge.storage import model_folders

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")


def names(layers: int = 3, prefix: str = "model.", suffix: str = ".weight") -> list[str]:
    inner = [f"{prefix}layers.{layer}.{linear}{suffix}" for layer in range(layers) for linear in LINEARS]
    return [f"{prefix}embed_tokens.weight", *inner, f"{prefix}norm.weight"]


FOUND = {
    "adapters": [f"base_model.model.{name}" for name in names(suffix=".lora_A.weight")[1:-1]],
    "adapters in it": [*names(suffix=".base_layer.weight"), *names(suffix=".lora_A.default.weight")[1:-1]],
    "gptq": names(suffix=".qweight"),
    "bitsandbytes": [*names(), *names(suffix=".weight.absmax")],
    "compressed": [*names(), *names(suffix=".weight_scale")],
    "peft": [f"base_model.model.{name}" for name in names()],
    "compiled": [f"_orig_mod.{name}" for name in names()],
    "wrapped": [f"module.{name}" for name in names()],
    "native": [f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in range(3)],
    "optimizer": [f"optimizer.state.exp_avg.{name}" for name in names()],
    "vision": [*names(), "vision_tower.encoder.layers.0.fc1.weight"],
    "inner model": names(prefix=""),
    "deeper": names(layers=5),
    "one more": [*names(), "model.extra.weight"],
    "exactly": names(),
}
SAID = {
    "adapters": "It holds adapters alone: give the model that they were trained beside as model.path",
    "adapters in it": "It holds adapters beside their model: merge them (merge_and_unload() of PEFT, or peft.merge=true",
    "gptq": "It is quantised by GPTQ or AWQ, which is not read so",
    "bitsandbytes": "It is quantised by bitsandbytes",
    "compressed": "It is quantised by compressed-tensors",
    "peft": "Its names have 'base_model.model.', which PEFT puts before them: save merge_and_unload()",
    "compiled": "Its names have '_orig_mod.', which torch.compile puts before them",
    "wrapped": "Its names have 'module.', which DistributedDataParallel puts before them",
    "native": "It holds Megatron's own parameters: export it with recipe=convert conversion.mode=export",
    "optimizer": "It holds an optimizer's state",
    "vision": "It is a model with images or sound",
    "inner model": "Its names begin with 'no prefix' where the model's begin with 'model.'",
    "deeper": "It has 5 layers, and its config.json says 3",
    "one more": "",
    "exactly": "",
}


@pytest.mark.parametrize("kind", FOUND)
def test_a_kind_is_told_by_its_names(kind: str) -> None:
    said = described(FOUND[kind], names())
    assert said.startswith(SAID[kind]) and bool(said) == bool(SAID[kind]), said


def test_a_folder_of_another_kind_is_told_before_its_config_is_missed(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match=r"holds PEFT's adapters, not a model: .* as peft\.path with peft=lora"):
        model_folders.local(tmp_path)
    step = tmp_path / "step_3"
    (step / "native").mkdir(parents=True)
    (step / "native" / ".metadata").touch()
    for folder in (step, step / "native"):
        with pytest.raises(CheckpointError, match=rf"is a native checkpoint, .* checkpoint\.resume={folder}"):
            model_folders.local(folder)
