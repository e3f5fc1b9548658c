"""Encodes parameters for an export's files: cast to a dtype, or quantised in blocks of FP8 with a scale each.

A cut or a fused parameter may spread a block over several ranks, so the ranks agree on the largest magnitude of every block before
anything is written. Scales and FP8 values follow from it, by the arithmetic of transformers'
integrations/finegrained_fp8.py:Fp8Quantize.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Final

import torch
import torch.distributed as dist

from megabridge.conversion.plan import Plan, TensorSpec
from megabridge.errors import ConfigError, listed
from megabridge.families.core.quantization import Quantization, quantization_of
from megabridge.hf.codecs import E4M3, E4M3_MAX, BlockFP8, expand_scales, factors_of, largest_of, runs_of, scales_of, sizes_of
from megabridge.hf.quantised_weights import SCALE_OF
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import native_box
from megabridge.mapping import Transfer, natural
from megabridge.parallel import collectives

METHODS: Final = ("fp8_block",)
_AT_ONCE: Final = 1 << 20  # elements whose magnitudes are compared at once
_BATCH: Final = 4 << 20  # blocks that ranks agree on at once, 4 bytes each
_LINEAR: Final = re.compile(r"\.layers\.\d+\..*\blinear_\w+\.weight")  # megatron-core's linears in layers, without routers


@dataclass(frozen=True)
class Encoder:
    """Encodes parameters as an export's files hold them.

    The tensors in `dtypes` are quantised, after a cast to the dtype there. `largest` has by name the largest magnitude of every
    block, for the tensors that this rank holds.
    """

    quantization: Quantization = field(default_factory=lambda: Quantization("fp8"))
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    largest: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def specs(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Returns the tensors that are written for `specs`, scales included, in natural order."""
        codec = BlockFP8(self.quantization.block)
        out = dict(specs)
        for name in self.dtypes:
            out[name] = replace(out[name], dtype=E4M3)
            out[name + SCALE_OF] = TensorSpec(codec.scales_shape(out[name].shape), torch.float32)
        return {name: out[name] for name in sorted(out, key=natural)}

    def unquantised(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorSpec]:
        """Returns the tensors of the files `infos` as they are before encoding."""
        names = (name for name in infos if name.removesuffix(SCALE_OF) not in self.dtypes or name in self.dtypes)
        return {name: TensorSpec(infos[name].shape, self.dtypes.get(name, infos[name].dtype)) for name in names}

    def encode(self, info: TensorInfo, part: Transfer, ours: torch.Tensor) -> torch.Tensor:
        """Returns `ours`, the native side of `part`, as the file holds it: on the CPU if quantised, else on its device."""
        if info.name not in self.dtypes:
            return ours.to(info.dtype)
        values = ours.to("cpu", self.dtypes[info.name]).reshape(sizes_of(part))
        codec = BlockFP8(self.quantization.block)
        factors = factors_of(self.largest[info.name], ue8m0=self.quantization.ue8m0)
        _, box = codec.boxes(part, info.shape, tuple(factors.shape))
        there = factors.as_strided(*box.hf_view()).reshape(sizes_of(box))
        scaled = expand_scales(there, runs_of(part), codec.sizes(len(info.shape))).mul_(values)
        return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).view(ours.shape)

    def scales(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor) of the scales of every quantised tensor that this rank holds."""
        for name, largest in self.largest.items():
            yield name + SCALE_OF, scales_of(largest, ue8m0=self.quantization.ue8m0)


def tensors_to_quantise(plan: Plan, quantization: Quantization) -> list[str]:
    """Returns the tensors of `plan` to quantise, in its order: the linears in layers that `quantization` doesn't exclude.

    Raises ConfigError for a model whose linears no published checkpoint has in block FP8.
    """
    linears = {name for name, sources in plan.sources.items() if any(_LINEAR.search(source.native) for source in sources)}
    kinds = {re.sub(r"\d+", "0", name) for name in linears}  # passthrough layers have no native name, only the files'
    names = [name for name in plan.tensors if re.sub(r"\d+", "0", name) in kinds]
    names = [
        name for name in names if not quantization.excludes(name.removesuffix(".weight")) and len(plan.tensors[name].shape) > 1
    ]
    odd = [
        f"{name} {plan.tensors[name].shape}" for name in names if not name.endswith(".weight") or len(plan.tensors[name].shape) != 2
    ]
    if odd:
        raise ConfigError(
            "quantization=fp8_block needs matrices named *.weight; these have no published form in block FP8, export in "
            "bfloat16:\n  " + listed(odd)
        )
    return names


def quantization_for(
    plan: Plan, method: str | None, config: Mapping[str, Any]
) -> tuple[Quantization, dict[str, Any]] | tuple[None, None]:
    """Returns the quantisation for `method` and its quantization_config; both are the source's where its `config` has block FP8.

    Raises ConfigError for an unknown method.
    """
    if method is None:
        return None, None
    if method not in METHODS:
        raise ConfigError(f"quantization={method!r} must be one of {', '.join(METHODS)}.")
    said = quantization_of(config)
    if said is not None and said.method == "fp8":
        return said, dict(config["quantization_config"])
    plain = Quantization("fp8")
    names = set(tensors_to_quantise(plan, plain))
    others = [name.removesuffix(".weight") for name, spec in plan.tensors.items() if len(spec.shape) > 1 and name not in names]
    content = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": others,
        "quant_method": "fp8",
        "weight_block_size": list(plain.block),
    }
    return plain, content


def agree_on_encoder(
    plan: Plan, specs: Mapping[str, TensorSpec], quantization: Quantization | None, *, everything: bool
) -> Encoder:
    """Returns the encoder for `specs`, with the tensors that this rank holds or, on rank 0 with `everything`, all. Collective."""
    if quantization is None:
        return Encoder()
    with collectives.raise_together("choosing what to quantise"):
        names = tensors_to_quantise(plan, quantization)
    encoder = Encoder(quantization, {name: specs[name].dtype for name in names}, {})
    held = {name for item in plan.items for name in item.hf} | (set(names) if everything and collectives.rank() == 0 else set())
    grids = {name: BlockFP8(quantization.block).scales_shape(specs[name].shape) for name in names}
    largest: dict[str, torch.Tensor] = {}
    for batch in _batches(grids):
        flat = torch.zeros(sum(prod(grids[name]) for name in batch))
        parts = dict(zip(batch, torch.split(flat, [prod(grids[name]) for name in batch]), strict=True))
        with collectives.raise_together("finding the largest weights"):
            _fill(plan, {name: part.view(grids[name]) for name, part in parts.items()}, encoder)
        flat.copy_(_maximum(flat, plan))
        largest |= {name: part.view(grids[name]).clone() for name, part in parts.items() if name in held}
    return replace(encoder, largest=largest)


def _batches(grids: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for name, grid in grids.items():
        if batch and size + prod(grid) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += prod(grid)
    if batch:
        yield batch


def _fill(plan: Plan, grids: Mapping[str, torch.Tensor], encoder: Encoder) -> None:
    """Raises the entries of `grids` to the largest magnitudes of the boxes that this rank writes."""
    sizes = encoder.quantization.block
    for item in plan.items:
        for transfer in item.transfers if item.is_writer else ():
            name = item.hf[transfer.part]
            for part in transfer.split(_AT_ONCE) if name in grids and transfer.elements else ():
                raise_to(grids[name], part, native_box(item.local.data, part).to("cpu", encoder.dtypes[name]), sizes)


def raise_to(grid: torch.Tensor, part: Transfer, values: torch.Tensor, block: tuple[int, int]) -> None:
    """Raises the entries of `grid`, one per block of a tensor, to the largest magnitudes in `values`, its `part` on the CPU."""
    largest_of(values.to(torch.float32).reshape(sizes_of(part)), runs_of(part), block, grid)


def _maximum(flat: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Returns the elementwise maximum over all ranks. Collective."""
    if collectives.world_size() == 1:
        return flat
    moved = flat.to(collectives.communication_device(plan.items[0].local.data.device if plan.items else torch.device("cpu")))
    dist.all_reduce(moved, op=dist.ReduceOp.MAX)
    return moved.cpu()


def scale_owners(plan: Plan, names: Iterable[str]) -> dict[str, int]:
    """Returns by the name of each scale tensor the rank that writes it: the first that writes its weight."""
    return {name + SCALE_OF: min(source.rank for source in plan.sources[name]) for name in names}
