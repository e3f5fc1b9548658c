"""FP8 scales and amax histories of Transformer Engine's modules (delayed scaling), saved as plain tensors.

Transformer Engine stores them as a pickle, which it doesn't load unless told to trust it.
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
    """Copies the scales of this rank's modules to the CPU, by name; empty before the first step in FP8."""
    found: Scales = {}
    for name, module in _modules(chunks):
        states = {kind: module.fp8_meta.get(kind) for kind in _KINDS}
        if all(hasattr(state, "amax_history") for state in states.values()):
            tensors = {f"{kind}.{part}": getattr(states[kind], part).detach().cpu().clone() for kind in _KINDS for part in _PARTS}
            found[name] = {"num_gemms": module.fp8_meta["num_gemms"], **tensors}
    return found


@torch.no_grad()
def restore(chunks: Sequence[torch.nn.Module], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Restores the scales, before the first step. Modules that are not in the checkpoint start afresh."""
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
                if current is not None and current.shape == found[name][f"{kind}.{part}"].shape:  # not in another recipe
                    current.copy_(found[name][f"{kind}.{part}"])


@contextmanager
def preserved(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Restores the scales after the block, so that a forward pass that is no training step doesn't change them.

    Transformer Engine's kernels record the largest values in the history also without gradients: validation data would influence
    the rounding of training data, and a resumed run would differ.
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
