"""Compares logits with transformers after an import or an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, override

import torch

from megabridge.conversion.parity import is_readable, logits_parity
from megabridge.conversion.report import Report
from megabridge.errors import CheckpointError
from megabridge.hf.tensor_files import find_tensors
from megabridge.models.logits import gather_logits
from megabridge.parallel import collectives
from megabridge.training.hooks import Callback

if TYPE_CHECKING:
    from megabridge.bridge.auto_bridge import AutoBridge
    from megabridge.training.loop import Trainer


_NO_KL: Final = 1e-6
"""Nats per token below which two models in float32 say the same."""
LOGITS_TOKENS: Final = 64
"""Default number of tokens on which logits are compared."""


class ImportParity(Callback):
    """Logs the import's report as `import/*` and compares logits with the source's before the first step.

    Logits are compared on `logits_tokens` tokens; 0: not compared.
    """

    def __init__(self, logits_tokens: int = LOGITS_TOKENS) -> None:
        self.logits_tokens = logits_tokens

    @override
    def on_import(self, trainer: Trainer, report: Report) -> None:
        trainer.log({f"import/{name}": value for name, value in report.metrics().items()})
        line = f"import: {report}"
        bridge = trainer.bridge
        if bridge is not None and bridge.source.location is not None:
            line += _with_source(trainer, bridge, self.logits_tokens)
        trainer.say(line)


def _with_source(trainer: Trainer, bridge: AutoBridge, length: int) -> str:
    """Returns `compare_logits` with the source, or why not: the source may have been removed since. Every rank calls it."""
    try:
        with collectives.raise_together("opening the source"):
            folder = bridge.weights_folder()
            find_tensors(folder, allow_bin=bridge.source.allow_bin)
    except CheckpointError as error:
        return f"; logits not compared: {error}"
    return compare_logits(trainer, folder, length, prefix="import")


def compare_logits(trainer: Trainer, folder: Path, length: int, *, prefix: str) -> str:
    """Compares logits of the model in memory with transformers' of `folder`, and logs them as `prefix`/logits_*. Collective.

    Returns the result as the end of a log line. The batch is the same in every run: `length` tokens (0: nothing is compared),
    spread over the vocabulary.
    """
    if length == 0:
        return "; logits not compared"
    if not collectives.on_rank_zero("checking that transformers can read the weights", lambda: is_readable(folder)):
        return "; logits not compared: transformers needs the package accelerate for quantised weights (pip install accelerate)"
    assert trainer.bridge is not None
    size = int(trainer.bridge.source.config["vocab_size"])
    # 7919 is a prime that divides no vocabulary size, so no token repeats early and neighbours are far apart.
    tokens = (torch.arange(length) * 7919 % size)[None]
    figures = logits_parity(gather_logits(trainer.chunks, tokens), folder, tokens, dtype=trainer.config.model.dtype)
    trainer.log({f"{prefix}/{name}": value for name, value in figures.items()})
    return f"; logits {described(figures)}"


def described(figures: Mapping[str, float]) -> str:
    """How logits compare with transformers', as the end of a sentence about them."""
    distance, divergence, agreement = (figures[f"logits_{name}"] for name in ("max_abs_diff", "kl", "top1_agreement"))
    if divergence < _NO_KL and agreement == 1:
        return f"equal transformers'{f' to {distance:.1g}' if distance else ''}"
    kl = f"{divergence:.2g}" if divergence >= _NO_KL else "0"
    return f"against transformers': max abs difference {distance:.2g}, KL {kl}, top-1 agreement {agreement:.1%}"
