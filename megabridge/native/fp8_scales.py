"""Scales of FP8 with delayed scaling: what Transformer Engine's modules know of the largest values of earlier steps.

Transformer Engine stores them as a pickle, which it doesn't read again unless asked to trust it. Here they are plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.utils import get_model_config, unwrap_model

_KINDS: Final = ("scaling_fwd", "scaling_bwd")
_PARTS: Final = ("scale", "amax_history")

Scales = dict[str, dict[str, Any]]


def scales(chunks: Sequence[torch.nn.Module]) -> Scales:
    """Copies on the CPU of what this rank's modules have, by name; nothing where no module has taken a step in FP8."""
    found: Scales = {}
    for name, module in _modules(chunks):
        states = {kind: module.fp8_meta.get(kind) for kind in _KINDS}
        if all(hasattr(state, "amax_history") for state in states.values()):
            tensors = {f"{kind}.{part}": getattr(states[kind], part).detach().cpu().clone() for kind in _KINDS for part in _PARTS}
            found[name] = {"num_gemms": module.fp8_meta["num_gemms"], **tensors}
    return found


@torch.no_grad()
def restore(chunks: Sequence[torch.nn.Module], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives them back, before the first step. Modules that the checkpoint doesn't know begin anew."""
    config = get_model_config(chunks[0])
    known = [(name, module) for name, module in _modules(chunks) if name in found and config.fp8 is not None]
    for name, module in known:
        meta = module.fp8_meta
        meta["num_gemms"] = found[name]["num_gemms"]
        meta["recipe"] = get_fp8_recipe(config)
        module.init_fp8_meta_tensors(meta["recipe"])
        for kind in _KINDS:
            for part in _PARTS:
                current = getattr(meta[kind], part, None)
                if current is not None and current.shape == found[name][f"{kind}.{part}"].shape:  # another history, or recipe
                    current.copy_(found[name][f"{kind}.{part}"])


@contextmanager
def preserved(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """A forward pass inside it that is no training step leaves no trace in the scales of the next one.

    Transformer Engine's kernels write the largest values that they see into the history also where no gradient is asked for; what
    was measured on validation data would decide how training data is rounded, and a resumed run would differ.
    """
    before = scales(chunks)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, module in _modules(chunks):
                for kind in _KINDS:
                    state = module.fp8_meta.get(kind)
                    if getattr(state, "amax_history", None) is None:  # 16 bits, or a recipe that keeps no history
                        continue
                    if name in before:
                        state.scale.copy_(before[name][f"{kind}.scale"])
                        state.amax_history.copy_(before[name][f"{kind}.amax_history"])
                    else:  # made by this pass
                        state.scale.fill_(1)
                        state.amax_history.zero_()


def _modules(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    for index, chunk in enumerate(unwrap_model(list(chunks))):
        for name, module in chunk.named_modules():
            if isinstance(getattr(module, "fp8_meta", None), dict):
                yield f"{index}.{name}", module
