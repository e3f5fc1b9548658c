"""Routing that sums in another order can't change.

Layouts, processors and numbers of threads add the same numbers in other orders, so that a router's logits differ in their last
digits. Where two experts of a token are nearly tied, another one is taken then, and everything after it is another computation. What
tests compare across layouts keeps away from ties: models and batches are such that all logits may move by `STEADY`, and the tests say
so of every forward pass. Adam makes a step of the learning rate's size out of a gradient that is nothing but such digits, unless its
epsilon is above them: `EPSILON`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from megabridge import AutoBridge
from megabridge.models.layers.router import Router
from megabridge.models.logits import gather_logits

STEADY: Final = 1e-4
"""By which a logit may move. Between a processor's vector units they differ by 1e-5 at most before the first step; after three steps
of adapters single ones differ by up to 7e-4, so that later passes are further from certain."""
EPSILON: Final = 1e-4
"""Gradients that cancel to nearly nothing differ by about 1e-9 between vector units; most are near 1e-3."""


def is_steady(router: Router, logits: torch.Tensor) -> bool:
    """Whether all tokens go to the same experts, and as many of them count, wherever `logits` [tokens, experts] move by STEADY.

    Tried are the worst moves: what was chosen falls and the rest rises, by experts and by groups; and random ones. Weights that
    change by more than such a move does are those of a sparse mixer, in which an expert counts or doesn't.
    """
    weights, chosen = _dense(router, logits)
    generator = torch.Generator().manual_seed(1)
    moves = [1.0 - 2.0 * chosen, *(torch.randint(0, 2, logits.shape, generator=generator).to(logits) * 2.0 - 1.0 for _ in range(3))]
    if router.config.moe_router_group_topk:
        groups = chosen.view(len(chosen), router.config.moe_router_num_groups, -1)
        moves.append((1.0 - 2.0 * groups.amax(-1, keepdim=True)).expand_as(groups).reshape(chosen.shape))
    for move in moves:
        other, others = _dense(router, logits + STEADY * move)
        if not torch.equal(others, chosen) or float((other - weights).abs().max()) > 100 * STEADY:
            return False
    return True


def _dense(router: Router, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, experts = router.select(logits)
    return torch.zeros_like(logits).scatter(1, experts, weights.type_as(logits)), torch.zeros_like(logits).scatter(1, experts, 1.0)


@contextmanager
def watched() -> Iterator[list[bool]]:
    """While entered, whether each router was steady in each forward pass."""
    routing, found = Router.routing, list[bool]()

    def looked_at(self: Router, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            found.append(is_steady(self, logits.detach().float().reshape(-1, logits.shape[-1])))
        return routing(self, logits, *args, **kwargs)

    Router.routing = looked_at  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Router.routing = routing  # type: ignore[method-assign]


def is_model_steady(folder: Path, *inputs: torch.Tensor) -> bool:
    """Whether all routers of the model in `folder` are steady for tokens [b, s]. In a process of its own groups, or none."""
    model = AutoBridge.from_hf_pretrained(folder).to_megatron_model(backend="torch")
    with watched() as found:
        for tokens in inputs:
            gather_logits(model, tokens)
    assert found, "the model has routers"
    return all(found)
