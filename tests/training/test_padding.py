"""How far rows are padded changes no loss and no gradient, under any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer

EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_router_load_balancing_type": "none",
}


@pytest.mark.parametrize(
    ("topology", "settings"),
    [
        (Topology(), {}),
        (Topology(dp=2), {}),
        (Topology(tp=2), {"sequence_parallel": True}),
        (Topology(pp=2), {}),
        (Topology(pp=2, vpp=2), {}),
        (Topology(dp=2, ep=2), EXPERTS),
    ],
    ids=lambda value: str(value) if isinstance(value, Topology) else "",
)
def test_padding_changes_no_loss_and_no_gradient(ranks: RankServer, topology: Topology, settings: dict[str, Any]) -> None:
    for found in ranks.run("tests.support.padding:both", topology=topology, kwargs={"settings": {"seq_length": 64, **settings}}):
        full, short = found["seq_length"], found["longest"]
        assert short["places"] < full["places"]
        assert short["validation"] == (pytest.approx(full["validation"][0], abs=1e-5), full["validation"][1])
        for (totals, gradients), (wanted, expected) in zip(short["steps"], full["steps"], strict=True):
            assert totals[1] == wanted[1] > 100
            assert totals[0] / totals[1] == pytest.approx(wanted[0] / wanted[1], abs=1e-5)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5, msg=name)
            norms = [float(torch.stack([one.norm() for one in each.values()]).norm()) for each in (gradients, expected)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-5)
