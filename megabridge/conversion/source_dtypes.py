"""Gives a model that is converted but never run the dtypes of the tensors in the files, so that nothing is rounded.

All parameters of one kind, which differ only by their layer or expert, have one dtype: a native checkpoint stores them as one
tensor. Where the dtypes of their tensors differ, it is the smallest that holds all values, and an export casts back losslessly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import torch

from megabridge.conversion.plan import Plan
from megabridge.hf.dtypes import joined
from megabridge.hf.safetensors_format import TensorInfo

_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")


def keep_source_dtypes(plan: Plan, infos: Mapping[str, TensorInfo]) -> bool:
    """Reallocates this rank's parameters in the dtypes of the tensors that will fill them. Returns whether any dtype changed.

    The parameters' values are lost, and `plan` still has the previous dtypes. A kind with a missing tensor or a tensor of integers
    stays as it is: the import reports those.
    """
    wanted = _by_kind(plan, infos)
    others = [
        (item.local.parameter, dtype)
        for item in plan.items
        if (dtype := wanted.get(_kind(item.record.name))) is not None and dtype != item.local.parameter.dtype
    ]
    for parameter, dtype in others:
        parameter.data = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
    return bool(others)


def _by_kind(plan: Plan, infos: Mapping[str, TensorInfo]) -> dict[str, torch.dtype]:
    feeding: dict[str, set[str]] = {}
    for tensor, sources in plan.sources.items():
        for source in sources:
            feeding.setdefault(_kind(source.native), set()).add(tensor)
    for item in plan.items:  # copies that this rank holds but doesn't write
        feeding.setdefault(_kind(item.record.name), set()).update(item.hf)
    copies = {tensor: plan.copies_of(tensor, infos) for tensor in plan.tensors}
    found = {
        kind: {infos[name].dtype for tensor in tensors for name in copies[tensor]}
        for kind, tensors in feeding.items()
        if tensors <= infos.keys()
    }
    return {kind: joined(dtypes) for kind, dtypes in found.items() if all(dtype.is_floating_point for dtype in dtypes)}


def _kind(native: str) -> str:
    return _NUMBER.sub("0", native)
