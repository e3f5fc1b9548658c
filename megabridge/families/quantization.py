"""Quantised weights: what config.json's `quantization_config` says of the files, beside the model that it describes. Data only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from megabridge.errors import ConfigError, listed

KEY: Final = "quantization_config"
BLOCK: Final = (128, 128)
# What may be said, with the values that are read (None: any). Others could change what the stored numbers mean.
_Settings = Mapping[str, tuple[Any, ...] | None]
_FP8: Final[_Settings] = {
    "quant_method": ("fp8",),
    "fmt": (None, "e4m3", "float8_e4m3fn"),
    "scale_fmt": (None, "float", "ue8m0"),
    "expert_dtype": (None, "fp8"),
    "activation_scheme": (None, "dynamic"),  # of activations; "static" brings tensors of their scales
    "weight_block_size": None,
    "modules_to_not_convert": None,
    "ignored_layers": None,  # MiniMax's name for it
    "modules_to_convert": (None, []),
    "dequantize": None,
}
_MXFP4: Final[_Settings] = {
    "quant_method": ("mxfp4",),
    "modules_to_not_convert": None,
    "dequantize": None,
}
_KNOWN: Final[Mapping[Any, _Settings]] = {"fp8": _FP8, "mxfp4": _MXFP4}


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's weights are stored: `method` is "fp8" or "mxfp4".

    Of fp8, each `block` (rows, columns) has a scale, which is a power of two with `ue8m0`. `excluded` are the modules that aren't
    quantised, as config.json names them.
    """

    method: str
    block: tuple[int, int] = BLOCK
    ue8m0: bool = False
    excluded: tuple[str, ...] = ()

    def excludes(self, module: str) -> bool:
        """Whether `module` stays as it is: a name matches its beginning, up to a dot, as a pattern, or its end (transformers
        quantizers/quantizers_utils.py:should_convert_module)."""
        return any(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(key) for key in self.excluded)


def quantization_of(hf: Mapping[str, Any]) -> Quantization | None:
    """What a config.json says; None where weights are stored as they are. Raises ConfigError for what can't be read."""
    said = hf.get(KEY)
    if said is None:
        return None
    if not isinstance(said, dict):
        raise ConfigError(f"{KEY}={said!r} must be an object with a quant_method; remove it if the weights aren't quantised.")
    method = said.get("quant_method")
    known = _KNOWN.get(method) if isinstance(method, str) else None
    if known is None:
        raise ConfigError(
            f"{KEY} with quant_method={method!r} can't be read; supported: {', '.join(map(repr, _KNOWN))}. Use the model's "
            "unquantised weights, or dequantise it with the tool that made it and save it in bfloat16."
        )
    problems = [f"{key}={value!r}" for key, value in said.items() if key not in known or value not in (known[key] or (value,))]
    block = said.get("weight_block_size", list(BLOCK)) if method == "fp8" else list(BLOCK)
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        problems.append(f"weight_block_size={block!r} (two sizes are supported, not one scale for a whole tensor)")
    if problems:
        raise ConfigError(
            f"{KEY} with quant_method={method!r} has settings that aren't supported, {listed(problems)}; use the model's "
            "unquantised weights, or dequantise it with the tool that made it and save it in bfloat16."
        )
    excluded = said.get("modules_to_not_convert") or said.get("ignored_layers") or ()
    return Quantization(str(method), (block[0], block[1]), said.get("scale_fmt") == "ue8m0", tuple(map(str, excluded)))
