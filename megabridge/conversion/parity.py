"""Parity of logits and of layers: the in-memory Megatron model against transformers, which reads the published folder by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megabridge import agreement
from megabridge.conversion.native import unwrap
from megabridge.layers.logits import gather_logits

from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_model_config


def logits_parity(ours: torch.Tensor, folder: Path, tokens: torch.Tensor, *, dtype: str) -> dict[str, float]:
    """How logits `ours` [batch, sequence, vocabulary] of `tokens` [batch, sequence] compare with those of the model in `folder`.

    Returns the largest absolute difference, the mean divergence KL(ours || theirs) in nats per token, and the share of positions
    whose most likely token agrees. Collective: rank 0 loads the model on the CPU and computes in `dtype`, which is the parameters'
    ("float32"); every rank gets the figures.
    """
    return agreement.on_rank_zero(
        "comparing logits with transformers", lambda: _compare(ours.float().cpu(), _logits(folder, tokens.cpu(), dtype))
    )


def hidden_parity(chunks: Sequence[torch.nn.Module], folder: Path, tokens: torch.Tensor, *, dtype: str) -> dict[str, float]:
    """Where a model departs from the one in `folder`: by place, the largest difference in units of transformers' deviation.

    The places are in order: "embedding", "layer 0" and so on but for the last layer, and "logits". `tokens` is [1, sequence].
    Collective; every rank gets the figures. What `first_difference` makes of them localises a wrong tensor.
    """
    seen: dict[int, torch.Tensor] = {}
    hooks = [hook for chunk in chunks for module in unwrap(chunk).modules() if isinstance(module, TransformerLayer)
             for hook in _watch(module, seen)]  # fmt: skip
    try:
        logits = gather_logits(chunks, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    found = agreement.gather((parallel_state.get_tensor_model_parallel_rank(), seen))
    is_cut = bool(get_model_config(chunks[0]).sequence_parallel)

    def compare() -> dict[str, float]:
        ours: dict[int, torch.Tensor] = {}
        for number in sorted({number for _, part in found for number in part}):
            parts = dict(sorted((rank, part[number]) for rank, part in found if number in part))
            ours[number] = torch.cat(list(parts.values())) if is_cut else parts[min(parts)]
        return _departures(ours, logits.float().cpu(), _run(folder, tokens.cpu(), dtype))

    return agreement.on_rank_zero("comparing layers with transformers", compare)


def first_difference(figures: Mapping[str, float], tolerance: float) -> str | None:
    """The first place of `hidden_parity` that differs by more than `tolerance` (or is NaN), or None."""
    return next((place for place, figure in figures.items() if not figure <= tolerance), None)


def _watch(layer: Any, seen: dict[int, torch.Tensor]) -> list[Any]:
    """Hooks that keep a layer's output [s, b, h] under its number from 1, and what goes into the first layer under 0."""

    def after(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        seen.setdefault(layer.layer_number, output[0].detach().float().cpu())

    def before(module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.setdefault(0, (inputs[0] if inputs else named["hidden_states"]).detach().float().cpu())

    hooks = [layer.register_forward_hook(after)]
    return [*hooks, layer.register_forward_pre_hook(before, with_kwargs=True)] if layer.layer_number == 1 else hooks


def _departures(ours: dict[int, torch.Tensor], logits: torch.Tensor, theirs: Any) -> dict[str, float]:
    out = {}
    for number, hidden in enumerate(theirs.hidden_states[:-1]):  # the last one has gone through the final norm
        place = "embedding" if number == 0 else f"layer {number - 1}"
        out[place] = _departure(ours[number][: hidden.shape[1]].transpose(0, 1), hidden.float())
    return out | {"logits": _departure(logits, theirs.logits.float())}


def _departure(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.std())


def _logits(folder: Path, tokens: torch.Tensor, dtype: str) -> torch.Tensor:
    logits: torch.Tensor = _run(folder, tokens, dtype).logits
    return logits.float()


def _run(folder: Path, tokens: torch.Tensor, dtype: str) -> Any:
    """transformers' output, with hidden states, of the model in `folder`."""
    from transformers import AutoModelForCausalLM  # seconds to import, and needed here only
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=False).eval()
    with torch.no_grad():
        return model(tokens, output_hidden_states=True)


def _compare(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = (log_ours.exp() * (log_ours - log_theirs)).sum(-1).mean()
    return {
        "logits_max_abs_diff": (ours - theirs).abs().max().item(),
        "logits_kl": divergence.item(),
        "logits_top1_agreement": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }
