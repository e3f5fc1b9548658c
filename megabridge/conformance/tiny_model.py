"""Tiny models: a family's tiny config with random weights, and the results that transformers computes with them.

A tiny model is one folder: the model as transformers writes it, `reference.safetensors` with a prompt, its logits and a batch, and
in `gradients` the gradients of that batch's mean loss, as a second model with the same names. transformers writes both, so that the
names of its tensors in memory don't matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megabridge.errors import ConfigError
from megabridge.families import Family
from megabridge.families.core.fields import Field, Json

REFERENCE: Final = "reference.safetensors"
GRADIENTS: Final = "gradients"
PROMPT: Final = 40  # minimum length in tokens
ROW: Final = 16
DEVIATIONS: Final = (0.2, 0.1, 0.05, 0.02)


@dataclass(frozen=True)
class Reference:
    """Prompt tokens [2, s] and their logits [2, s, vocabulary]; `rows` [n, ROW + 1] are the batch of the stored gradients."""

    prompt: Tensor
    logits: Tensor
    rows: Tensor

    @property
    def spread(self) -> float:
        """The standard deviation of the logits relative to the largest: near 0 all are alike and comparing them is pointless."""
        return float(self.logits.std() / self.logits.abs().max())


def tiny_config(family: Family, layers: int | None = None) -> dict[str, Any]:
    """Returns the config.json of a family's tiny model, in float32, with `layers` layers if given."""
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type, **family.tiny}
    config["dtype"] = "float32"
    config["pad_token_id"] = None  # transformers' embedding gives the padding token's row no gradient
    key = layers_key(family)
    if layers is None or key is None:
        return config
    for name, value in config.items():
        if isinstance(value, list) and len(value) == config[key] and name != "architectures":
            config[name] = (value * layers)[:layers]  # a list with an entry per layer
    config[key] = layers
    return config


def layers_key(family: Family) -> str | None:
    """Returns the key of the number of layers in the architecture's config.json; None if there is none."""
    found = [field.hf for field in family.fields if isinstance(field, Field) and field.native == "num_layers"]
    return found[0] if found else None


def prompt_length(native: Mapping[str, Any]) -> int:
    """Returns a prompt length in tokens, a multiple of 8, beyond a tiny model's window and its ropes' original lengths.

    It is at most the model's number of positions.
    """
    window = native.get("window_size")
    ropes = [native.get("rope"), native.get("local_rope")]
    past = [PROMPT, 0 if window is None else window[0] + 9]
    past += [rope.get("original_max_position_embeddings", 0) + 8 for rope in ropes if rope]
    length = max(size for size in past if size <= 512)
    return int(min(-(-length // 8) * 8, native["seq_length"]))


def write_tiny_model(folder: Path, config: Json, family: Family, *, ranks: int = 1, seed: int = 3) -> Path:
    """Writes a tiny model with `config` to `folder`, for up to `ranks` data-parallel ranks. One rank calls it.

    Every tensor is random, norms and biases too. Raises ConfigError when transformers can't build the model.
    """
    native = family.native(config)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, native["vocab_size"], (2, prompt_length(native)), generator=generator)
    rows = torch.randint(0, native["vocab_size"], (ranks * -(-8 // ranks), ROW + 1), generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2)
    (folder / "config.json").write_text(text)
    for deviation in DEVIATIONS:
        model = _random_model(folder, seed=seed, deviation=deviation)
        with torch.no_grad():
            logits = model(prompt).logits.float()
        if not _is_saturated(logits):
            break
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text)  # as given: what transformers adds is not part of it
    loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits.float().flatten(0, 1), rows[:, 1:].flatten())
    torch.autograd.backward(loss)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(folder / GRADIENTS)
    save_file({"prompt": prompt, "logits": logits.contiguous(), "rows": rows}, folder / REFERENCE)
    return folder


def read_reference(folder: Path) -> Reference:
    """Reads the reference of a tiny model that `write_tiny_model` wrote."""
    return Reference(**load_file(folder / REFERENCE))


def quiet() -> None:
    """Turns off transformers' progress bars and its warnings about small configs in this process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _random_model(folder: Path, *, seed: int, deviation: float) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:  # whatever a config class or a model of transformers raises
        raise ConfigError(f"transformers can't build a model of the tiny config: {type(error).__name__}: {error}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            # A parameter initialised to a constant, 0 or 1, is a bias or a norm: it keeps that mean.
            constant = parameter.flatten()[0].item()
            centre = constant if bool((parameter == constant).all()) else 0.0
            parameter.normal_(mean=centre, std=deviation)
        stored = model.state_dict()
        for name, buffer in model.named_buffers():  # correction biases of routers
            if name in stored:
                buffer.normal_(std=deviation)
    return model.eval()


def _is_saturated(logits: Tensor) -> bool:
    """Whether many logits are as large as the largest one, because a cap has made them alike."""
    largest = logits.abs().max()
    return bool((logits.abs() > 0.97 * largest).float().mean() > 0.02)
