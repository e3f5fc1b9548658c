"""Initial values of LoRA's A: PEFT's distribution, drawn from the seed and the tensor's name, so that no layout changes them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megabridge.conversion.parameters import collect_parameters
from megabridge.conversion.plan import Expansion
from megabridge.families import Family
from megabridge.hf.tensor_files import native_box, view
from megabridge.mapping import Dims
from megabridge.peft.rules import ENDINGS


@torch.no_grad()
def fill(chunks: Sequence[Any], family: Family, dims: Dims, seed: int) -> None:
    """Fills lora_A of every adapter in `chunks`; `family` is that of the adapters (`attach.adapted`). No communication."""
    expansion = Expansion(family, dims)
    for live in collect_parameters(chunks, adapters=True):
        entry = expansion.entry(live.record)
        if live.parameter.is_meta or not entry.hf[0].endswith(ENDINGS["lora_A"]):
            continue
        last, whole = -1, torch.empty(0)
        for transfer in entry.transfers:
            if transfer.part != last:
                last, whole = transfer.part, _values(entry.hf[transfer.part], transfer.hf_shape, seed)
            native_box(live.parameter, transfer).copy_(view(whole, transfer.hf_view()))


def _values(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of one Hugging Face tensor, uniform between -1 / sqrt(in) and 1 / sqrt(in)."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    bound = 1 / math.sqrt(shape[-1])  # as torch.nn.Linear, and so PEFT
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
