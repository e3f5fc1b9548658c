"""Quantised folders: each pair of packed weight and scales is presented as one bfloat16 tensor."""

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

SCALE_OF: Final = "_scale_inv"  # suffix of a weight's name
_BLOCKS, _SCALES = "_blocks", "_scales"
_SCALE_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class Encoding:
    """The two stored tensors of a quantised weight, and their codec. `packed` has the shape that the codec's boxes use."""

    packed: TensorInfo
    scales: TensorInfo
    codec: Codec

    def boxes(self, part: Transfer) -> tuple[tuple[TensorInfo, Transfer], tuple[TensorInfo, Transfer]]:
        """Returns the boxes of the two tensors that are needed for a part of the weight."""
        packed, scales = self.codec.boxes(part, self.packed.shape, self.scales.shape)
        return (self.packed, packed), (self.scales, scales)


def find_weights(folder: Path, *, allow_bin: bool = False) -> dict[str, TensorInfo]:
    """Finds every tensor of a model's folder (see `find_tensors`), quantised ones as one tensor each, according to config.json.

    Raises CheckpointError, also for missing or mismatched scales, and ConfigError for a quantisation that is not supported.
    """
    return pair_scales(find_tensors(folder, allow_bin=allow_bin), quantization_of(assets.read_config(folder)), folder)


def pair_scales(infos: Mapping[str, TensorInfo], quantization: Quantization | None, folder: Path) -> dict[str, TensorInfo]:
    """Returns `infos` with the two tensors of a quantised weight replaced by one. Raises CheckpointError with all mismatches."""
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
    """Makes the decoded tensor of `packed` and `scales`; adds a line to `problems` if the scales don't match the codec."""
    wanted = codec.scales_shape(packed.shape)
    dtypes = (torch.uint8,) if isinstance(codec, MXFP4) else _SCALE_DTYPES
    if scales.shape != wanted or scales.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        problems.append(f"{scales.name} must be {names} {wanted}, not {scales.dtype} {scales.shape}")
    seen = replace(packed, shape=codec.packed_shape(packed.shape))
    return replace(packed, name=name, dtype=torch.bfloat16, shape=codec.shape(packed.shape), encoding=Encoding(seen, scales, codec))
