"""Runs in ranks: scales of FP8 through a native checkpoint. Transformer Engine needs CUDA; here a module stands for one of its linears."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megabridge.models.logits import gather_logits
from megabridge.native import checkpoint
from megabridge.training.step import validate
from tests.support import tiny

from megatron.core.utils import get_model_config, unwrap_model


class Linear(torch.nn.Module):
    """Has what Transformer Engine's modules (2.20) have of delayed scaling after a step, and makes it when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        assert recipe is self.fp8_meta["recipe"]
        for kind, each in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            count = each * self.fp8_meta["num_gemms"]
            self.fp8_meta[kind] = SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(4, count))

    def step(self, seed: int) -> None:
        self.fp8_meta |= {"num_gemms": 2, "recipe": "delayed"}
        self.init_fp8_meta_tensors("delayed")
        random = torch.Generator().manual_seed(seed)
        for tensor in self.tensors():
            tensor.uniform_(generator=random)

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for kind in ("scaling_fwd", "scaling_bwd") for tensor in vars(self.fp8_meta[kind]).values()]


def through_a_checkpoint(folder: str, *, stepped: bool) -> tuple[bool, list[str]]:
    """(whether a new model's scales are the saved one's bit for bit, which modules of it have any)."""
    models = []
    for _ in range(2):
        chunks = tiny.model()
        get_model_config(chunks[0]).fp8 = "hybrid"
        linears = [Linear() for _ in chunks]
        for chunk, linear in zip(unwrap_model(chunks), linears, strict=True):
            chunk.decoder.layers[0].stands_for_linear = linear
        models.append((chunks, linears))
    (before, old), (after, new) = models
    for number, linear in enumerate(old if stepped else []):
        linear.step(dist.get_rank() * 10 + number)
    checkpoint.save(Path(folder), before, progress=checkpoint.TrainingProgress(step=3))
    checkpoint.load(Path(folder), after)
    filled = [f"{number}" for number, linear in enumerate(new) if linear.fp8_meta]
    pairs = [
        pair for one, other in zip(old, new, strict=True) if filled for pair in zip(one.tensors(), other.tensors(), strict=True)
    ]
    return all(torch.equal(one, other) for one, other in pairs), filled


def looked_at(stepped: bool) -> list[bool]:
    """Whether scales are as before, or as new where no step was taken, after logits, and after a validation that wrote into them."""
    chunks = tiny.model()
    get_model_config(chunks[0]).fp8 = "hybrid"
    linears = [Linear() for _ in chunks]
    for number, (chunk, linear) in enumerate(zip(unwrap_model(chunks), linears, strict=True)):
        chunk.decoder.layers[0].stands_for_linear = linear
        if stepped:
            linear.step(number)
        chunk.register_forward_pre_hook(lambda *_, linear=linear: linear.step(99))
    expected = [[t.clone() for t in linear.tensors()] if stepped else None for linear in linears]

    def is_untouched() -> bool:
        fresh = [torch.ones(6), torch.zeros(4, 6), torch.ones(4), torch.zeros(4, 4)]
        pairs = zip(linears, expected, strict=True)
        return all(
            torch.equal(one, other) for linear, old in pairs for one, other in zip(linear.tensors(), old or fresh, strict=True)
        )

    gather_logits(chunks, torch.arange(4)[None])
    after_logits = is_untouched()
    data = tiny.Samples(1)
    batches = data.validation_batches(dp_rank=0, dp_size=1)
    validate(chunks, batches, micro_batch_size=1, seq_length=tiny.SEQUENCE)
    return [after_logits, is_untouched()]
