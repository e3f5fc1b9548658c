"""Quantization of a checkpoint's weights, from config.json's `quantization_config`. Data only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from megabridge.config.value_types import FLAG, OBJECT, SIZE, Kind, list_of, one_of, shown, text
from megabridge.errors import ConfigError, listed

KEY: Final = "quantization_config"
BLOCK: Final = (128, 128)
# ".*" matches any name: patterns with many of them could take hours to match.
_NAME: Final = re.compile(r"(?:[\w-]|\.\*?){1,256}")
_NAMES: Final = list_of(
    Kind("a module's name", lambda name: isinstance(name, str) and bool(_NAME.fullmatch(name)) and name.count("*") < 4)
)
_SIZES: Final = Kind(
    "two sizes (one scale for a whole tensor is not supported)", lambda block: list_of(SIZE).allows(block) and len(block) == 2
)
# Supported keys and values. Others could change the meaning of the stored numbers.
_SHARED: Final[Mapping[str, Kind]] = {
    "quant_method": text(),
    "modules_to_not_convert": _NAMES.or_null(),
    "dequantize": FLAG.or_null(),
}
_FP8: Final[Mapping[str, Kind]] = {
    **_SHARED,
    "fmt": one_of(None, "e4m3", "float8_e4m3fn"),
    "scale_fmt": one_of(None, "float", "ue8m0"),
    "expert_dtype": one_of(None, "fp8"),
    "activation_scheme": one_of(None, "dynamic"),  # of activations; with "static" files have tensors of their scales
    "weight_block_size": _SIZES,
    "ignored_layers": _NAMES.or_null(),  # MiniMax's name for it
    "modules_to_convert": one_of(None, []),
}
_KNOWN: Final[Mapping[str, Mapping[str, Kind]]] = {"fp8": _FP8, "mxfp4": _SHARED}


@dataclass(frozen=True)
class Quantization:
    """The storage format of a checkpoint's weights: `method` is "fp8" or "mxfp4".

    In fp8 each `block` (rows, columns) has a scale, which is a power of two with `ue8m0`. `excluded` are patterns of modules that
    aren't quantised, from config.json.
    """

    method: str
    block: tuple[int, int] = BLOCK
    ue8m0: bool = False
    excluded: tuple[str, ...] = ()

    def excludes(self, module: str) -> bool:
        """Whether `module` is not quantised: an entry of `excluded` matches its beginning, up to a dot, as a pattern, or its end
        (transformers quantizers/quantizers_utils.py:should_convert_module)."""
        return any(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(key) for key in self.excluded)


def quantization_of(hf: Mapping[str, Any]) -> Quantization | None:
    """Reads a config.json; None if weights aren't quantised. Raises ConfigError for formats that aren't supported."""
    said = hf.get(KEY)
    if said is None:
        return None
    if not OBJECT.allows(said):
        raise ConfigError(f"{KEY}={shown(said)} must be an object with a quant_method; remove it if the weights aren't quantised.")
    method = said.get("quant_method")
    known = _KNOWN.get(method) if isinstance(method, str) else None
    if known is None:
        raise ConfigError(
            f"{KEY} with quant_method={shown(method)} can't be read; supported: {', '.join(map(repr, _KNOWN))}. Use the model's "
            "unquantised weights, or dequantise it with the tool that made it and save it in bfloat16."
        )
    problems = [f"{shown(key)[1:-1]}={shown(value)}" for key, value in said.items() if key not in known]
    problems += [problem.rstrip(".") for key, kind in known.items() if (problem := kind.problem(said, key, KEY)) is not None]
    if problems:
        raise ConfigError(
            f"{KEY} with quant_method={method!r} has settings that aren't supported, {listed(problems)}; use the model's "
            "unquantised weights, or dequantise it with the tool that made it and save it in bfloat16."
        )
    block = said.get("weight_block_size", BLOCK)
    excluded = said.get("modules_to_not_convert") or said.get("ignored_layers") or ()
    return Quantization(str(method), (block[0], block[1]), said.get("scale_fmt") == "ue8m0", tuple(excluded))
