"""Packed rows beside padded ones, on the tiny model."""

from __future__ import annotations

import random
from typing import Any

import torch

from megabridge.data.batches import Batching, Sample
from megabridge.training.step import Batch, forward_backward, validate
from tests.support import tiny

from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

LENGTH = 64
SIZES = (3, 40, 17, 2, 22, 31, 9, 64, 12, 25)
"""Positions of each document; one fills a row alone."""


def documents() -> list[Sample]:
    chance = random.Random(0)
    made = []
    for size in SIZES:
        tokens = [chance.randrange(tiny.VOCABULARY) for _ in range(size + 1)]
        made.append(Sample(tokens, [False] + [chance.random() < 0.7 or place == 0 for place in range(size)]))
    return made


def batches(samples: list[Sample], *, packing: bool, micro: int) -> list[Batch]:
    """All samples once, as many micro-batches as it takes, an even number."""
    batching = Batching(LENGTH, micro, micro, 0, packing=packing)
    return batching.validation(samples, dp_rank=0, dp_size=1)


def both(settings: dict[str, Any], micro: int | None = 2) -> dict[str, Any]:
    """Of padded and of packed batches: [loss sum, tokens], mean by `validate`, gradients by place in the whole model, and by depth
    the mean losses of multi-token prediction. With `micro` None all rows are in one micro-batch."""
    chunks = tiny.model(**settings)
    found: dict[str, Any] = {}
    for name, packing in (("padded", False), ("packed", True)):
        rows = Batching(LENGTH, 1, 1, 0, packing=packing).rows(documents(), 0)
        made = batches(documents(), packing=packing, micro=micro or len(rows))
        made += [{**made[0], "loss_mask": torch.zeros_like(made[0]["loss_mask"])}] * (-len(made) % 4)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        MTPLossLoggingHelper.tracker.clear()
        totals = forward_backward(chunks, made, forward_only=False)
        ahead = _ahead()
        gradients = {}
        for chunk in chunks:
            for key, parameter in chunk.named_parameters():
                gradients[f"{chunks.index(chunk)}/{key}"] = parameter.main_grad.clone()
        mean = validate(chunks, made[:3], micro_batch_size=made[0]["tokens"].shape[0], seq_length=LENGTH)
        found[name] = {
            "totals": totals.tolist(),
            "gradients": gradients,
            "batches": len(made),
            "validation": mean,
            "ahead": ahead,
        }
    return found


def _ahead() -> list[float]:
    """The mean losses of multi-token prediction since they were cleared, by depth; none on stages that have no such layer."""
    return list(MTPLossLoggingHelper.tracker.get("loss_values", torch.zeros(0)).tolist())


def by_document(settings: dict[str, Any]) -> tuple[list[Any], list[Any], int, int]:
    """Each document's losses in packed rows, before and after one is replaced; which, and how many share its row with it."""
    chunks = tiny.model(**settings)
    samples = documents()
    row = max(Batching(LENGTH, 1, 1, 0, packing=True).rows(samples, 0), key=len)
    swapped = samples.index(row[1])
    chance = random.Random(1)
    other = Sample([chance.randrange(tiny.VOCABULARY) for _ in samples[swapped].tokens], samples[swapped].mask)
    changed = [other if number == swapped else sample for number, sample in enumerate(samples)]
    return _losses(chunks, samples), _losses(chunks, changed), swapped, len(row)


def _losses(chunks: list[Any], samples: list[Sample]) -> list[tuple[float, list[float]]]:
    """Of each document, computed with all of them in the batch and the others masked: (loss sum, mean losses by depth ahead)."""
    found = []
    for chosen in range(len(samples)):
        masked = [
            sample if number == chosen else Sample(sample.tokens, [False] * len(sample.tokens))
            for number, sample in enumerate(samples)
        ]
        MTPLossLoggingHelper.tracker.clear()
        with torch.no_grad():
            totals = forward_backward(chunks, batches(masked, packing=True, micro=1), forward_only=True)
        found.append((float(totals[0]), _ahead()))
    return found
