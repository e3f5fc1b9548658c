"""Drafts a family file from config.json and the headers of the safetensors files. No weights are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from megabridge.config.value_types import OBJECT, Kind, is_deep, list_of, shown, whole
from megabridge.conformance.architecture import SIZES, Shape, UnknownModel, read_model
from megabridge.conformance.infer_architecture import EPSILONS, DraftRows, infer_rows
from megabridge.conformance.tiny_model import quiet
from megabridge.errors import ConfigError, listed
from megabridge.families.core.ranges import EPSILON, range_of
from megabridge.families.core.rope_types import SHARE, THETA, value_problems
from megabridge.families.core.unread_keys import is_harmless

_IMPORTS: Final = {
    "megabridge.families.core.fields": ("Choice", "Converted", "Field", "Fixed", "Derived"),
    "megabridge.families.core.parts": (
        "GATED_SILU", "LAYER", "QKV", "QKV_JOINED", "TIED", "UNTIED", "attention", "embeddings", "gated_mlp", "plain_mlp",
        "post_norms", "pre_norms", "qk_norms", "rms", "sizes",
    ),
    "megabridge.families.core.rope_and_windows": ("LayerRopes", "Rope", "SlidingWindow", "every"),
    "megabridge.mapping": ("Same", "Transpose", "WeightMap", "block", "weight"),
}  # fmt: skip
_TINY: Final = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "kv_channels": 16, "vocab_size": 131,
    "seq_length": 256,
}  # fmt: skip
_PLAIN: Final = re.compile(r"[\w.-]{1,512}", re.ASCII)
# Values of a tiny config that have to fit its sizes.
_SMALL: Final = {"sliding_window": 12, "max_window_layers": 2, "query_pre_attn_scalar": 16}


def class_defaults(model_type: str) -> tuple[dict[str, Any], frozenset[str]]:
    """Returns the defaults of transformers' config class for keys that a config.json lacks, and the keys that every model has.

    There are no defaults for a model that transformers doesn't know.
    """
    from transformers import AutoConfig, PreTrainedConfig

    quiet()
    general = PreTrainedConfig().to_dict()
    try:
        known: dict[str, Any] = AutoConfig.for_model(model_type).to_dict()
        # A value that changes with the sizes is derived from them and is no default.
        other: dict[str, Any] = AutoConfig.for_model(model_type, hidden_size=96, num_attention_heads=6).to_dict()
    except Exception:  # an unknown model_type, or a class that refuses these sizes
        return {}, frozenset(general)
    return {key: value for key, value in known.items() if key not in general and other.get(key) == value}, frozenset(general)


def draft(config: Mapping[str, Any], shapes: Mapping[str, Shape], source: str) -> tuple[str, list[str]]:
    """Returns the Python source of a family file, and a line for each thing left to do.

    The file can always be imported; it converts once no line with "no rule" is left. Raises ConfigError for a config.json without
    an architecture or without sizes.
    """
    _check(config, shapes, source)
    defaults, general = class_defaults(str(config["model_type"]))
    model = read_model(config, shapes, defaults)
    rows = infer_rows(model, general)
    body = _body(config, model, rows, general)
    used = {module: [name for name in names if re.search(rf"\b{name}\b", body)] for module, names in _IMPORTS.items()}
    imports = ["from megabridge.families import Family"]
    imports += [f"from {module} import {', '.join(names)}" for module, names in used.items() if names]
    notes = [f"# TODO {line}" for line in rows.todo]
    head = f'"""{config["architectures"][0]}, drafted from {re.sub(r"[^\w .-]", "_", source)}: see docs/adding-a-family.md."""'
    return "\n".join([head, "", *imports, "", *notes, "# fmt: off", body, ""]), rows.todo


# A draft is Python code that will be run: values from files are checked before they are put into it.
_NAME: Final = Kind("a name of letters, digits, _, - and .", lambda value: isinstance(value, str) and bool(_PLAIN.fullmatch(value)))
_READ: Final[Mapping[str, Kind]] = {
    "model_type": _NAME.needed(),
    "layer_types": list_of(_NAME).or_null(),
    "sliding_window": whole(0, 2**31 - 1).or_null(),
    "rope_parameters": OBJECT.or_null(),
    "rope_scaling": OBJECT.or_null(),
    "rope_theta": THETA.or_null(),
    "partial_rotary_factor": SHARE.or_null(),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), _NAME.or_null()),
    **dict.fromkeys(EPSILONS, EPSILON.or_null()),
    **{key: range_of(native).or_null() for native, keys in SIZES.items() for key in keys},
}


def _check(config: Mapping[str, Any], shapes: Iterable[str], source: str) -> None:
    """Raises ConfigError for missing or invalid keys of a config.json, and for invalid tensor names."""
    architectures = Kind("a list with the class's name", lambda value: bool(value) and list_of(_NAME).allows(value)).needed()
    kinds = {"architectures": architectures, **_READ}
    problems = [problem for key, kind in kinds.items() if (problem := kind.problem(config, key)) is not None]
    ropes = [config.get(key) for key in ("rope_parameters", "rope_scaling")]
    problems += [problem for rope in ropes if OBJECT.allows(rope) for problem in value_problems(rope or {})]
    problems += [f"{shown(key)} is nested too deeply; remove it." for key, value in config.items() if is_deep(value)]
    problems += [f"the tensor {shown(name)} must have {_NAME.says}." for name in shapes if not _NAME.allows(name)]
    if problems:
        raise ConfigError(f"{source}: " + listed(problems))


def module_name(config: Mapping[str, Any]) -> str:
    """Returns a name for the file's module."""
    return re.sub(r"\W", "_", str(config["model_type"]))


def _body(config: Mapping[str, Any], model: UnknownModel, rows: DraftRows, general: frozenset[str]) -> str:
    place = "*LAYER" if model.prefix == "model.layers.{layer}" else f'"decoder.layers.{{layer}}", "{model.prefix}"'
    lines = [
        "FAMILY = Family(",
        f'    architecture="{config["architectures"][0]}",',
        f'    model_type="{config["model_type"]}",',
        "    fields=(",
        *(f"        {row}," for row in rows.fields),
        "    ),",
        "    weights=WeightMap(",
        *(f"        {row}," for row in rows.outside),
        f"        block({place},",
        *(f"              {row}," for row in rows.layer),
        "        ),",
        "    ),",
    ]
    if model.ignored:
        lines.append(f"    ignored=({', '.join(_text(name) for name in model.ignored)},),")
    lines += [
        "    tiny={",
        *(f"        {_text(key)}: {_text(value)}," for key, value in _tiny(config, model, general - rows.read).items()),
        "    },",
        ")",
    ]
    return "\n".join(lines)


def _text(value: object) -> str:
    """Returns a Python literal as our formatter would write it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_text(inner) for inner in value) + "]"
    if isinstance(value, str):
        return json.dumps(value) if value.isascii() else ascii(value)
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)


def _tiny(config: Mapping[str, Any], model: UnknownModel, left_out: frozenset[str]) -> dict[str, Any]:
    """Returns a config.json of the same architecture with small sizes."""
    by_key = {key: native for native, key in model.sizes.items()}
    layers, heads, groups = (model.size(name) or 1 for name in ("num_layers", "num_attention_heads", "num_query_groups"))
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in left_out or value is None:
            continue
        native = by_key.get(key)
        if native == "num_query_groups":
            out[key] = 8 if groups == heads else 1 if groups == 1 else 4
        elif native in _TINY:
            out[key] = _TINY[native]
        elif key in ("rope_parameters", "rope_scaling"):
            out[key] = _small_rope(value, 16 if "kv_channels" in model.sizes else 8)
        elif key == "original_max_position_embeddings":
            out[key] = 16
        elif isinstance(value, list) and len(value) == layers:
            out[key] = _each_kind(value, _TINY["num_layers"])
        elif key in _SMALL:
            out[key] = _SMALL[key]
        elif not is_harmless(key) or key == "initializer_range":
            out[key] = value
    return out


def _small_rope(rope: Any, width: int) -> Any:
    """Returns rotary settings for heads of `width`, whose scaling has an effect on short prompts."""
    if not isinstance(rope, dict):
        return rope
    out = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            out[key] = _small_rope(value, width)
        elif key == "original_max_position_embeddings":
            out[key] = 16
        elif key in ("short_factor", "long_factor"):
            out[key] = value[: int(width * rope.get("partial_rotary_factor", 1.0)) // 2]
        else:
            out[key] = value
    return out


def _each_kind(values: list[Any], count: int) -> list[Any]:
    """Returns `count` entries with every distinct one of `values`, in the order of their first occurrence."""
    if len({_text(value) for value in values[:count]}) == len({_text(value) for value in values}):
        return (values * count)[:count]
    kinds: Iterable[Any] = {_text(value): value for value in values}.values()
    return (list(kinds) * count)[:count]
