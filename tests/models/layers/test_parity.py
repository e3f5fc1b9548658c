"""Logits and losses of random Llama models equal transformers' under every layout, in fp32."""

from __future__ import annotations

from typing import Any, Final

import pytest

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer

TOLERANCE: Final = 1e-4
LINEAR: Final = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3: Final = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN: Final = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

# Shapes of the model; each runs under each layout unless it can't.
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "odd_vocabulary": {"vocab_size": 131},
    "tied_odd_vocabulary": {"vocab_size": 129, "tie_word_embeddings": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "two_kv_heads": {"num_key_value_heads": 2, "attention_bias": True},
    "linear": {"rope_parameters": LINEAR},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn_with_factors": {
        "rope_parameters": {**YARN, "attention_factor": 0.8, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}
    },
}

LAYOUTS: Final[dict[str, tuple[Topology, dict[str, Any]]]] = {
    "single": (Topology(), {}),
    "tp2": (Topology(tp=2), {"tensor_model_parallel_size": 2}),
    "tp2sp": (Topology(tp=2), {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp4": (Topology(tp=4), {"tensor_model_parallel_size": 4}),
    "pp2": (Topology(pp=2), {"pipeline_model_parallel_size": 2}),
    "pp2vpp2": (
        Topology(pp=2, vpp=2),
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "tp2pp2": (Topology(tp=2, pp=2), {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(ranks: RankServer, layout: str) -> None:
    topology, settings = LAYOUTS[layout]
    results = ranks.run(
        "tests.support.parity:compare",
        topology=topology,
        kwargs={"cases": [(shape, settings) for shape in SHAPES.values()]},
    )
    for on_rank in results:
        for name, result in zip(SHAPES, on_rank, strict=True):
            assert result["scale"] > 0.3, f"{name}: the weights are too small for the comparison to say much"
            assert result["logits"] < TOLERANCE, f"{name}: {result}"
            assert result["loss"] < TOLERANCE, f"{name}: {result}"


def test_a_rank_may_hold_padding_only(ranks: RankServer) -> None:
    """5 tokens over tp4, padded to 16: ranks 2 and 3 hold no real column."""
    settings = {"tensor_model_parallel_size": 4, "make_vocab_size_divisible_by": 4}
    results = ranks.run(
        "tests.support.parity:compare",
        topology=Topology(tp=4),
        kwargs={"cases": [({"vocab_size": 5}, settings), ({"vocab_size": 5, "tie_word_embeddings": True}, settings)]},
    )
    for on_rank in results:
        assert all(result["logits"] < TOLERANCE and result["loss"] < TOLERANCE for result in on_rank)


UNEVEN: Final = [
    # pp, vpp, layers, setting, expected split[pp][vpp]
    (2, None, 5, {}, [[3], [2]]),
    (2, None, 1, {}, [[1], [0]]),
    (2, 2, 5, {}, [[1, 1], [2, 1]]),
    (2, 2, 3, {}, [[1, 1], [1, 0]]),
    (2, 2, 2, {}, [[0, 1], [1, 0]]),
    (2, None, 4, {"pipeline_model_parallel_layout": "Et|tttL"}, [[1], [3]]),
    (2, None, 4, {"pipeline_model_parallel_layout": [["embedding"], [*["decoder"] * 4, "loss"]]}, [[0], [4]]),
    (2, None, 4, {"pipeline_model_parallel_layout": "E|tt|t|tL"}, [[0, 1], [2, 1]]),
    (2, None, 4, {"num_layers_in_last_pipeline_stage": 1}, [[3], [1]]),
]


def test_uneven_stages(ranks: RankServer) -> None:
    cases = [
        (
            {"num_hidden_layers": layers, "tie_word_embeddings": layers % 2 == 0},
            {"pipeline_model_parallel_size": pp, "virtual_pipeline_model_parallel_size": vpp, **settings},
        )
        for pp, vpp, layers, settings, _ in UNEVEN
    ]
    results = ranks.run("tests.support.parity:compare", topology=Topology(pp=2), kwargs={"cases": cases})
    for on_rank in results:
        for result, (_, _, _, _, split) in zip(on_rank, UNEVEN, strict=True):
            assert result["split"] == split
            assert result["vpp"] == len(split[0])
            assert result["logits"] < TOLERANCE, result


def test_four_uneven_stages(ranks: RankServer) -> None:
    """The first and the last stage are lighter."""
    cases = [({"num_hidden_layers": layers}, {"pipeline_model_parallel_size": 4}) for layers in (2, 3, 6, 7)]
    results = ranks.run("tests.support.parity:compare", topology=Topology(pp=4), kwargs={"cases": cases})
    for on_rank in results:
        assert [result["split"] for result in on_rank] == [
            [[0], [1], [1], [0]],
            [[1], [1], [1], [0]],
            [[1], [2], [2], [1]],
            [[2], [2], [2], [1]],
        ]
        assert all(result["logits"] < TOLERANCE for result in on_rank)


def test_sequence_parallel_pads_odd_lengths(ranks: RankServer) -> None:
    results = ranks.run(
        "tests.support.parity:compare",
        topology=Topology(tp=2, pp=2, vpp=2),
        kwargs={
            "cases": [
                (
                    {"vocab_size": 131},
                    {
                        "tensor_model_parallel_size": 2,
                        "pipeline_model_parallel_size": 2,
                        "virtual_pipeline_model_parallel_size": 2,
                        "sequence_parallel": True,
                    },
                )
            ],
            "length": 31,
        },
    )
    assert all(result["logits"] < TOLERANCE for on_rank in results for result in on_rank)
