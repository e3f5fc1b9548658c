"""Reads and writes PEFT's adapter folders: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from megabridge.errors import CheckpointError, ConfigError, listed
from megabridge.hf import assets
from megabridge.hf.assets import ADAPTER as CONFIG
from megabridge.hf.safetensors_format import TensorInfo, read_header
from megabridge.peft import config_fields
from megabridge.peft.lora_config import ALL_LINEAR, LoRA
from megabridge.peft.rules import ENDINGS, PREFIX

WEIGHTS: Final = assets.ADAPTER_WEIGHTS


def write_config(folder: Path, lora: LoRA, *, base: str | None, revision: str | None = None, is_transposed: bool = False) -> None:
    """Writes adapter_config.json; `base` is the model's folder or hub id, `is_transposed` whether its linears are [in, out].

    One rank calls it.
    """
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "target_modules": ALL_LINEAR if lora.takes_all else sorted(lora.target_modules),
        "exclude_modules": sorted(lora.exclude_modules) or None,
        "target_parameters": sorted(lora.target_parameters) or None,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha if lora.lora_alpha % 1 else int(lora.lora_alpha),
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "fan_in_fan_out": is_transposed,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def explicit(lora: LoRA, linears: Mapping[str, bool], parameters: Mapping[str, bool]) -> LoRA:
    """Returns the same settings with the names of the adapted modules and parameters.

    `linears` and `parameters` have all names in transformers' model, and whether each has an adapter.
    """
    return replace(lora, target_modules=_ends(linears), exclude_modules=(), target_parameters=_ends(parameters))


def _ends(names: Mapping[str, bool]) -> tuple[str, ...]:
    """The last parts of the adapted names, or their whole names if a name without an adapter has the same last part."""
    chosen = [name for name, is_adapted in names.items() if is_adapted]
    last = {name.rpartition(".")[2] for name in chosen}
    is_enough = not any(name.rpartition(".")[2] in last for name, is_adapted in names.items() if not is_adapted)
    return tuple(sorted(last if is_enough else chosen))


def read_config(folder: Path) -> LoRA:
    """Reads the settings in `folder`. Raises CheckpointError, and ConfigError with everything that is not supported."""
    path = folder / CONFIG
    content = assets.read_object(path, otherwise="name the folder of an adapter that PEFT or megabridge saved")
    if problems := config_fields.problems(content):
        raise ConfigError(
            f"{path} has settings that are not supported; train or save the adapter without them:\n  {listed(problems)}"
        )
    parameters = _names(content.get("target_parameters"), ())
    try:
        return LoRA(
            target_modules=_names(content.get("target_modules"), () if parameters else (ALL_LINEAR,)),
            exclude_modules=_names(content.get("exclude_modules"), ()),
            target_parameters=parameters,
            r=content["r"],
            lora_alpha=float(content["lora_alpha"]),
            lora_dropout=float(content.get("lora_dropout") or 0.0),
            use_rslora=bool(content.get("use_rslora")),
            use_dora=bool(content.get("use_dora")),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; train the adapter without it.") from None


def _names(value: Any, otherwise: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a list, else `otherwise`: with PEFT's other forms (a regular expression, nothing) the tensors decide."""
    if value == ALL_LINEAR:
        return (ALL_LINEAR,)
    return tuple(value) if isinstance(value, list) and value else otherwise


def find_weights(folder: Path) -> dict[str, TensorInfo]:
    """Reads the header of the tensors in `folder`. Raises CheckpointError without safetensors: pickled files are never read."""
    others = sorted(path.name for path in folder.glob("adapter_model*"))
    if WEIGHTS not in others:
        found = f"it has {', '.join(others)}; save it again with safe_serialization=True" if others else "it has no weights"
        raise CheckpointError(f"{folder} must hold {WEIGHTS}; {found}.")
    return read_header(folder / WEIGHTS)


def modules_of(names: Collection[str]) -> list[str]:
    """The Hugging Face modules that a file with the tensors `names` adapts. Raises CheckpointError for other tensors."""
    found: dict[str, None] = {}
    strange = []
    for name in names:
        ending = next((ending for ending in ENDINGS.values() if name.startswith(PREFIX) and name.endswith(ending)), None)
        if ending is None:
            strange.append(name)
        else:
            found[name.removeprefix(PREFIX).removesuffix(ending)] = None
    if strange:
        raise CheckpointError(
            "an adapter's tensors must be lora_A, lora_B and lora_magnitude_vector of linears:\n  " + listed(strange)
        )
    return list(found)


def check_rank(infos: Mapping[str, TensorInfo], r: int, *, is_stacked: bool) -> None:
    """Raises CheckpointError for tensors whose shapes are not those of adapters of rank `r`.

    With `is_stacked` some hold all experts of a layer, each with rank `r`.
    """
    wrong = []
    for name, info in infos.items():
        kind = next(kind for kind, ending in ENDINGS.items() if name.endswith(ending))
        dim = {"lora_A": 0, "lora_B": 1}.get(kind)
        if dim is None:
            is_right, rule = len(info.shape) == 1, "one dimension"
        else:
            size = info.shape[dim] if len(info.shape) == 2 else 0
            is_right = size == r or (is_stacked and size > 0 and size % r == 0)
            rule = f"two dimensions, number {dim} of size r={r}"
        if not is_right:
            wrong.append(f"{name} {list(info.shape)} must have {rule}")
    if wrong:
        raise CheckpointError(
            "an adapter's tensors must be of the rank that its adapter_config.json says; fetch it again:\n  " + listed(wrong)
        )
