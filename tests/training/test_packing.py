"""Packed rows: the losses and gradients of padded ones, and documents that don't see each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankError, RankServer

PACKING = "tests.support.packing"
# Heads, key-value groups and layers that three ranks can share.
SHAPE: dict[str, Any] = {"num_attention_heads": 6, "num_query_groups": 3, "num_layers": 6, "seq_length": 64}
LAYOUTS = [
    (Topology(), {}),
    (Topology(pp=3), {}),
    (Topology(tp=3, pp=3), {"sequence_parallel": False}),
    (Topology(tp=2, pp=2, vpp=2), {"sequence_parallel": True, "num_query_groups": 2}),
]


@pytest.mark.parametrize(("topology", "settings"), LAYOUTS, ids=[str(topology) for topology, _ in LAYOUTS])
def test_packed_and_padded_rows_have_the_same_loss_and_gradients(
    ranks: RankServer, topology: Topology, settings: dict[str, Any]
) -> None:
    for found in ranks.run(f"{PACKING}:both", topology=topology, kwargs={"settings": {**SHAPE, **settings}}):
        padded, packed = found["padded"], found["packed"]
        assert packed["batches"] < padded["batches"]
        assert packed["totals"][1] == padded["totals"][1] > 100
        assert packed["totals"][0] / packed["totals"][1] == pytest.approx(padded["totals"][0] / padded["totals"][1], abs=1e-5)
        assert packed["gradients"].keys() == padded["gradients"].keys()
        for name, gradient in packed["gradients"].items():
            torch.testing.assert_close(gradient, padded["gradients"][name], atol=2e-6, rtol=1e-4, msg=name)
        assert packed["validation"][1] > 0


AHEAD: dict[str, Any] = {"mtp_num_layers": 2, "hf_mtp_layers": 2, "share_embeddings_and_output_weights": False}
LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 12,
    "num_query_groups": 6,
}


@pytest.mark.parametrize(
    ("topology", "settings"),
    [
        (Topology(), {}),
        (Topology(), LATENT),
        (Topology(pp=2), {}),
        (Topology(tp=2, pp=2, vpp=2), {"sequence_parallel": True, "num_query_groups": 2, "num_layers": 4}),
    ],
    ids=["single", "single-latent", "pp2", "tp2pp2vpp2"],
)
def test_multi_token_prediction_ends_with_its_document(ranks: RankServer, topology: Topology, settings: dict[str, Any]) -> None:
    """Its loss is a mean over the micro-batch, which therefore has the same documents in both."""
    arguments = {"settings": {**SHAPE, "num_layers": 2, **AHEAD, **settings}, "micro": None}
    results = ranks.run(f"{PACKING}:both", topology=topology, kwargs=arguments)
    for found in results:
        padded, packed = found["padded"], found["packed"]
        assert packed["totals"][1] == padded["totals"][1] > 100
        assert packed["totals"][0] / packed["totals"][1] == pytest.approx(padded["totals"][0] / padded["totals"][1], abs=1e-5)
        assert packed["ahead"] == pytest.approx(padded["ahead"], abs=1e-5)
        assert packed["gradients"].keys() == padded["gradients"].keys()
        for name, gradient in packed["gradients"].items():
            torch.testing.assert_close(gradient, padded["gradients"][name], atol=2e-6, rtol=1e-4, msg=name)
    assert len(results[-1]["packed"]["ahead"]) == 2 and all(loss > 1 for loss in results[-1]["packed"]["ahead"])
    moved = [name for name, gradient in results[-1]["packed"]["gradients"].items() if "mtp." in name and gradient.any()]
    assert len(moved) > 10


@pytest.mark.parametrize(
    "style",
    [
        {"window_size": (6, 0), "window_attn_skip_freq": 2},
        {"attention_softcap": 2.0},
        {"softmax_type": "learnable"},
        {"query_temperature": (0.5, 8, 1), "qk_norm": "rotated"},
        {
            "window_size": (6, 0),
            "window_attn_skip_freq": 2,
            "local_rope": {"rope_type": "default", "rope_theta": 100.0},
        },
        {"window_size": (5, 0), "window_attn_skip_freq": 2, "attention_chunks": True},
        {"learned_positions": True, "rope": None},
        LATENT,
        {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_router_load_balancing_type": "none"},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ],
    ids=lambda style: "+".join(style),
)
def test_every_kind_of_attention(ranks: RankServer, style: dict[str, Any]) -> None:
    (found,) = ranks.run(f"{PACKING}:both", kwargs={"settings": {**SHAPE, "num_layers": 2, **style}})
    padded, packed = (found[name]["totals"] for name in ("padded", "packed"))
    assert packed[1] == padded[1]
    assert packed[0] / packed[1] == pytest.approx(padded[0] / padded[1], abs=1e-5)


@pytest.mark.parametrize(
    ("topology", "settings"),
    [(Topology(), {}), (Topology(tp=3, pp=3), {}), (Topology(), AHEAD)],
    ids=["single", "tp3pp3", "multi-token-prediction"],
)
def test_swapping_a_document_leaves_the_losses_of_the_others(
    ranks: RankServer, topology: Topology, settings: dict[str, Any]
) -> None:
    results = ranks.run(f"{PACKING}:by_document", topology=topology, kwargs={"settings": {**SHAPE, **settings}})
    for before, after, swapped, together in results:
        assert together >= 3
        differing = [number for number, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
        assert differing == [swapped]


def test_what_has_no_packed_rows_says_so(ranks: RankServer) -> None:
    with pytest.raises(RankError, match=r"backend=local has no packed sequences; set data\.packing=false"):
        ranks.run(f"{PACKING}:both", kwargs={"settings": {**SHAPE, "backend": "local"}})
