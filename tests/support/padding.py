"""Rows padded to the longest of their micro-batch or step beside rows of the full length, on the tiny model."""

from __future__ import annotations

from itertools import islice
from typing import Any

from megabridge.config.schema import Config
from megabridge.data.batches import Batching
from megabridge.training import build
from megabridge.training.step import forward_backward, validate
from tests.support import tiny
from tests.support.packing import LENGTH, documents

from megatron.core import parallel_state

STEP, MICRO = 8, 2


def both(settings: dict[str, Any]) -> dict[str, Any]:
    """Of both: [loss sum, tokens] and gradients by name of two steps, (mean, tokens) of a validation, and places of all rows."""
    chunks = tiny.model(**settings)
    config = Config()
    config.parallel.sequence_parallel = bool(settings.get("sequence_parallel"))
    rules = build.row_rules(config, has_experts="num_moe_experts" in settings)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    found: dict[str, Any] = {}
    for pad_to in ("seq_length", "longest"):
        batching = Batching(LENGTH, MICRO, STEP, 0, pad_to=pad_to, row_rules=rules)  # type: ignore[arg-type]  # its choices
        batches = batching.train(documents(), 0, seed=1, dp_rank=rank, dp_size=size)
        steps, places = [], 0
        for _ in range(2):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            taken = list(islice(batches, STEP // MICRO // size))
            places += sum(batch["tokens"].numel() for batch in taken)
            totals = forward_backward(chunks, taken, forward_only=False)
            names = ((f"{number}/{name}", p) for number, chunk in enumerate(chunks) for name, p in chunk.named_parameters())
            steps.append((totals.tolist(), {name: parameter.main_grad.clone() for name, parameter in names}))
        held_out = batching.validation(documents()[:5], dp_rank=rank, dp_size=size)
        mean = validate(chunks, held_out, micro_batch_size=MICRO, seq_length=LENGTH)
        found[pad_to] = {"steps": steps, "validation": mean, "places": places}
    return found
