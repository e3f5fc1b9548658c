"""Sizes of a model before any rank starts: read by its family, cheaply, without torch."""

from __future__ import annotations

import json
import subprocess
import sys

SIZES = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
PROGRAM = """
import json, sys
from pathlib import Path
from omegaconf import OmegaConf
from megabridge.config.schema import ModelConfig
from megabridge.launchers import run
from megabridge.launchers.prepare import conf_folder
from megabridge.layouts.shape import shape_of
from megabridge.families.core.known_sizes import known_sizes
first = known_sizes(ModelConfig(hf={"architectures": ["GPT2LMHeadModel"]}))
models = {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in sorted((conf_folder() / "model").glob("*.yaml"))}
sizes = {name: dict(known_sizes(ModelConfig(hf=model["hf"]))) for name, model in models.items() if "hf" in model}
parameters = {name: shape_of(each.get).parameters for name, each in sizes.items()}
loaded = sorted({"torch", "megatron", "transformers", "numpy"} & set(sys.modules))
print(json.dumps({"first": first, "sizes": sizes, "parameters": parameters, "loaded": loaded}))
"""


def test_sizes_of_every_named_model_are_known_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["loaded"] == [] and found["first"] == {}, "a config without sizes is its family's to refuse"
    assert len(found["sizes"]) > 60
    for name, sizes in found["sizes"].items():
        assert all(sizes.get(size) for size in SIZES), name
    assert found["sizes"]["gpt2"]["num_attention_heads"] == 12 and found["sizes"]["gpt2"]["num_layers"] == 12
    assert 0.7e11 > found["parameters"]["mixtral_8x7b"] > 0.4e11 and found["parameters"]["llama31_8b"] == 8_030_261_248
