"""Quantised folders: each packed weight and its scales presented as the one tensor in bfloat16 that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from megabridge.errors import CheckpointError, listed
from megabridge.families.core.quantization import Quantization, quantization_of
from megabridge.hf import assets
from megabridge.hf.codecs import E4M3, GROUP, MXFP4, BlockFP8, Codec
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import find_tensors
from megabridge.mapping import Transfer

SCALE_OF: Final = "_scale_inv"  # after a weight's name
_BLOCKS, _SCALES = "_blocks", "_scales"
_SCALE_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class Encoding:
    """The two tensors of a file that a quantised weight is read from, and how. `packed` is seen as the codec's boxes are."""

    packed: TensorInfo
    scales: TensorInfo
    codec: Codec

    def boxes(self, part: Transfer) -> tuple[tuple[TensorInfo, Transfer], tuple[TensorInfo, Transfer]]:
        """What of the two tensors a part of the weight needs."""
        packed, scales = self.codec.boxes(part, self.packed.shape, self.scales.shape)
        return (self.packed, packed), (self.scales, scales)


def find_weights(folder: Path, *, allow_bin: bool = False) -> dict[str, TensorInfo]:
    """Every tensor of a model's folder as the model has it (see `find_tensors`); config.json says what is quantised.

    Raises CheckpointError, also for scales that are missing or don't fit, ConfigError for a quantisation that can't be read.
    """
    return present(find_tensors(folder, allow_bin=allow_bin), quantization_of(assets.read_config(folder)), folder)


def present(infos: Mapping[str, TensorInfo], quantization: Quantization | None, folder: Path) -> dict[str, TensorInfo]:
    """`infos` with a quantised weight's two tensors replaced by the weight. Raises CheckpointError with all that doesn't fit."""
    problems: list[str] = []
    if quantization is None:
        stray = [name for name, info in infos.items() if info.dtype == E4M3 or info.name.endswith(SCALE_OF)]
        problems = [f"{name} is quantised, but config.json has no quantization_config" for name in stray]
        found = dict(infos)
    elif quantization.method == "fp8":
        found = _fp8(infos, quantization, problems)
    else:
        found = _mxfp4(infos, problems)
    if problems:
        raise CheckpointError(
            f"{folder} must hold quantised weights as its config.json says; fetch it again:\n  " + listed(problems)
        )
    return found


def _fp8(infos: Mapping[str, TensorInfo], quantization: Quantization, problems: list[str]) -> dict[str, TensorInfo]:
    codec = BlockFP8(quantization.block)
    scales = {name.removesuffix(SCALE_OF): info for name, info in infos.items() if name.endswith(SCALE_OF)}
    packed = {name: info for name, info in infos.items() if info.dtype == E4M3}
    problems += [f"{name}{SCALE_OF} has no {name} in float8_e4m3fn beside it" for name in scales if name not in packed]
    found = {name: info for name, info in infos.items() if name not in packed and not name.endswith(SCALE_OF)}
    for name, info in packed.items():
        if name not in scales:
            problems.append(f"{name} is float8_e4m3fn and lacks its scales, {name}{SCALE_OF}")
        elif len(info.shape) < 2:
            problems.append(f"{name} {info.shape} has no blocks of rows and columns")
        else:
            of_bytes = scales[name].dtype == torch.uint8 and quantization.ue8m0
            dtype = torch.float8_e8m0fnu if of_bytes else scales[name].dtype
            found[name] = _weight(name, info, replace(scales[name], dtype=dtype), codec, problems)
    return found


def _mxfp4(infos: Mapping[str, TensorInfo], problems: list[str]) -> dict[str, TensorInfo]:
    found = {}
    stems = {name.removesuffix(_BLOCKS) for name in infos if name.endswith(_BLOCKS)}
    for name, info in infos.items():
        stem = name.removesuffix(_BLOCKS)
        if name.endswith(_SCALES) and info.dtype == torch.uint8:
            if name.removesuffix(_SCALES) not in stems:
                problems.append(f"{name} has no {name.removesuffix(_SCALES)}{_BLOCKS} beside it")
        elif not name.endswith(_BLOCKS):
            found[name] = info
        elif f"{stem}{_SCALES}" not in infos:
            problems.append(f"{name} lacks its scales, {stem}{_SCALES}")
        elif info.dtype != torch.uint8 or len(info.shape) != 4 or info.shape[-1] != GROUP // 2:
            problems.append(f"{name} must be bytes of shape [experts, rows, groups, {GROUP // 2}], not {info.dtype} {info.shape}")
        else:
            found[stem] = _weight(stem, info, infos[f"{stem}{_SCALES}"], MXFP4(), problems)
    return found


def _weight(name: str, packed: TensorInfo, scales: TensorInfo, codec: Codec, problems: list[str]) -> TensorInfo:
    """The tensor that `packed` and `scales` stand for; a line is added to `problems` where the scales aren't the codec's."""
    wanted = codec.scales_shape(packed.shape)
    dtypes = (torch.uint8,) if isinstance(codec, MXFP4) else _SCALE_DTYPES
    if scales.shape != wanted or scales.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        problems.append(f"{scales.name} must be {names} {wanted}, not {scales.dtype} {scales.shape}")
    seen = replace(packed, shape=codec.packed_shape(packed.shape))
    return replace(packed, name=name, dtype=torch.bfloat16, shape=codec.shape(packed.shape), encoding=Encoding(seen, scales, codec))
