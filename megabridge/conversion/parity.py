"""Parity of logits: the Megatron model in memory against transformers, which reads the published folder itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from megabridge.config import optional_packages
from megabridge.families.core.quantization import KEY
from megabridge.hf import assets
from megabridge.parallel import collectives

_FOR_QUANTISED: Final = "accelerate"


def logits_parity(ours: torch.Tensor, folder: Path, tokens: torch.Tensor, *, dtype: str) -> dict[str, float]:
    """Compares logits `ours` [batch, sequence, vocabulary] of `tokens` [batch, sequence] with those of the model in `folder`.

    Returns the largest absolute difference, the mean divergence KL(ours || theirs) in nats per token, and the share of positions
    whose most likely token agrees. Collective: rank 0 loads the model on the CPU in `dtype`, that of the parameters ("float32");
    every rank gets the figures.
    """
    return collectives.on_rank_zero(
        "comparing logits with transformers", lambda: _compare(ours.float().cpu(), _logits(folder, tokens.cpu(), dtype))
    )


def load_hf(folder: Path, dtype: str) -> Any:
    """Loads transformers' model of a folder on the CPU, in evaluation mode, with eager attention: other kernels drop softcaps.

    `dtype` is float32, ..., or auto for that of the folder. Raises ConfigError where the package that transformers needs for
    quantised weights isn't installed.
    """
    if not is_readable(folder):
        optional_packages.require(_FOR_QUANTISED)
    from transformers import AutoModelForCausalLM  # seconds to import, and needed here only
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="eager", trust_remote_code=False).eval()


def is_readable(folder: Path) -> bool:
    """Whether transformers can read the weights of `folder` here: it needs a package to dequantise."""
    return assets.read_config(folder).get(KEY) is None or optional_packages.is_installed(_FOR_QUANTISED)


def _logits(folder: Path, tokens: torch.Tensor, dtype: str) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_hf(folder, dtype)(tokens).logits
    return logits.float()


def _compare(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = (log_ours.exp() * (log_ours - log_theirs)).sum(-1).mean()
    return {
        "logits_max_abs_diff": (ours - theirs).abs().max().item(),
        "logits_kl": max(divergence.item(), 0.0),  # below 0 by rounding alone
        "logits_top1_agreement": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }
