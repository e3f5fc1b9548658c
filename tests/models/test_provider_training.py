"""Training under every layout takes the same steps: losses, gradient norms and gradients agree with transformers'."""

from __future__ import annotations

from typing import Any, Final

import pytest

from megabridge.parallel.topology import Topology
from tests.support.covering import further
from tests.support.rank_server import RankServer

TOLERANCE: Final = 1e-4
STEPS: Final = 4
TP, PP, VPP, SP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "sequence_parallel",
)
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "tied_biased_odd": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "vocab_size": 131,
        "num_key_value_heads": 1,
        "num_hidden_layers": 5,
    },
}
LAYOUTS: Final[dict[str, tuple[Topology, dict[str, Any]]]] = {
    "tp2": (Topology(tp=2), {TP: 2}),
    "tp2sp": (Topology(tp=2), {TP: 2, SP: True}),
    "pp2": (Topology(pp=2), {PP: 2}),
    "tp2pp2": (Topology(tp=2, pp=2), {TP: 2, PP: 2}),
    "pp2vpp2": (Topology(pp=2, vpp=2), {PP: 2, VPP: 2}),
    "tp2pp2vpp2": (Topology(tp=2, pp=2, vpp=2), {TP: 2, PP: 2, VPP: 2}),
    "tp2pp2vpp2sp": (Topology(tp=2, pp=2, vpp=2), {TP: 2, PP: 2, VPP: 2, SP: True}),
    "dp2": (Topology(dp=2), {}),
    "tp2dp2": (Topology(tp=2, dp=2), {TP: 2}),
}


def run(ranks: RankServer, topology: Topology, settings: dict[str, Any]) -> list[list[dict[str, Any]]]:
    cases = [(shape, settings) for shape in SHAPES.values()]
    return ranks.run("tests.support.train:train", topology=topology, kwargs={"cases": cases, "steps": STEPS})


@pytest.fixture(scope="module")
def single(ranks: RankServer) -> list[dict[str, Any]]:
    [results] = run(ranks, Topology(), {})
    return results


def test_single_equals_transformers(single: list[dict[str, Any]]) -> None:
    for result in single:
        loss, grad_norm = result["hf"]
        assert result["loss"][0] == pytest.approx(loss, abs=TOLERANCE)
        assert result["grad_norm"][0] == pytest.approx(grad_norm, rel=TOLERANCE)
        assert result["gradient"] < TOLERANCE
        assert result["loss"][-1] != pytest.approx(result["loss"][0], abs=0.01), "the steps must change something"


@pytest.mark.parametrize(
    "layout", ["dp2", "tp2pp2vpp2sp", *further(*(name for name in LAYOUTS if name not in ("dp2", "tp2pp2vpp2sp")))]
)
def test_steps_agree(ranks: RankServer, single: list[dict[str, Any]], layout: str) -> None:
    topology, settings = LAYOUTS[layout]
    for on_rank in run(ranks, topology, settings):
        for name, result, wanted in zip(SHAPES, on_rank, single, strict=True):
            assert result["loss"] == pytest.approx(wanted["loss"], abs=TOLERANCE), name
            assert result["grad_norm"] == pytest.approx(wanted["grad_norm"], abs=TOLERANCE), name
            assert result["gradient"] < TOLERANCE, name
