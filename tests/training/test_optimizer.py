"""The optimizer from the typed config: learning rates over the steps, who is decayed, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankError, RankServer

CASES = "tests.support.optimizers"


def test_rates_over_the_steps(ranks: RankServer) -> None:
    schedules: list[dict[str, Any]] = [
        {"name": "constant"},
        {"name": "constant", "warmup_steps": 3},
        {"name": "linear", "min_lr": 0.1},
        {"name": "cosine", "warmup_steps": 2},
        {"name": "cosine", "decay_steps": 4, "min_lr": 0.2},
        {"name": "wsd", "decay_steps": 4},
        {"name": "wsd"},
        {"name": "wsd", "decay_steps": 4, "wsd_decay": "minus_sqrt"},
        {"name": "wsd", "decay_steps": 4, "wsd_decay": "cosine", "min_lr": 0.5},
        {"name": "wsd", "decay_steps": 4, "wsd_decay": "exponential"},
    ]
    (rates,) = ranks.run(f"{CASES}:rates", kwargs={"schedules": schedules, "steps": 10})
    constant, warm, linear, cosine, short, wsd, tenth, root, half_cosine, exponential = rates
    assert constant == [1.0] * 10
    # No step is lost at a rate of 0, neither the first nor the last.
    assert warm == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)
    assert linear == pytest.approx([0.1 + 0.9 * (1 - step / 10) for step in range(10)])
    assert cosine == pytest.approx([1 / 3, 2 / 3] + [0.5 * (math.cos(math.pi * step / 8) + 1) for step in range(8)])
    assert short[4:] == pytest.approx([0.2] * 6) and short[0] == 1.0
    assert wsd == pytest.approx([1.0] * 7 + [0.75, 0.5, 0.25])
    assert tenth == pytest.approx([1.0] * 10)
    assert root[6:] == pytest.approx([1 - math.sqrt(part / 4) for part in range(4)])
    assert half_cosine[6:] == pytest.approx([0.5 + 0.25 * (math.cos(math.pi * part / 4) + 1) for part in range(4)])
    assert exponential[6:] == pytest.approx([2 * 0.5 ** (part / 4) - 1 for part in range(4)])


def test_norms_and_biases_are_not_decayed(ranks: RankServer) -> None:
    for decayed, kept in ranks.run(f"{CASES}:decay", topology=Topology(pp=2)):
        assert decayed and kept
        assert all(name.endswith("weight") and "norm" not in name for name in decayed)
        assert all("norm" in name or name.endswith("bias") for name in kept)
    patterns = ["embedding.*", "*.linear_proj.weight"]
    for decayed, kept in ranks.run(f"{CASES}:decay", topology=Topology(pp=2), kwargs={"no_decay": patterns}):
        matrices = [name for name in kept if "norm" not in name and not name.endswith("bias")]
        assert matrices and all("embedding" in name or "linear_proj" in name for name in matrices)
        assert decayed and not any("embedding" in name or "linear_proj" in name for name in decayed)


def test_clipping_bounds_the_update(ranks: RankServer) -> None:
    ((clipped, free),) = ranks.run(f"{CASES}:clipped_sgd")
    assert clipped == pytest.approx(0.5, rel=1e-3)
    assert free > 1.0


def test_sgd_goes_on_after_a_resume(ranks: RankServer, tmp_path: Path) -> None:
    ((whole, halves),) = ranks.run(f"{CASES}:sgd_in_halves", kwargs={"folder": str(tmp_path)})
    assert halves == whole


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "message"),
    [
        ({"name": "sgd"}, {}, r"optimizer.name=sgd has no distributed form.*optimizer.distributed=false"),
        ({"distributed": False}, {}, r"optimizer.distributed=False must match"),
        ({}, {"name": "cosine", "warmup_steps": 10}, r"scheduler.warmup_steps=10 must be less than the 10 steps"),
        ({}, {"name": "wsd", "decay_steps": 11}, r"scheduler.decay_steps=11 must be at most recipe.steps=10"),
        ({"overlap_grad_reduce": True}, {}, r"optimizer.overlap_grad_reduce=True must match"),
        ({"overlap_param_gather": True}, {}, r"optimizer.overlap_param_gather=true needs optimizer.distributed=true and"),
        ({"loss_scale": 8.0}, {}, r"optimizer.loss_scale=8.0 needs model.dtype=float16"),
        ({"lr": 1e-3}, {"min_lr": 1e-2}, r"scheduler.min_lr=0.01 must be at most optimizer.lr=0.001"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    ranks: RankServer, optimizer: dict[str, Any], scheduler: dict[str, Any], message: str
) -> None:
    with pytest.raises(RankError, match=message):
        ranks.run(f"{CASES}:build", kwargs={"optimizer": optimizer, "scheduler": scheduler})
