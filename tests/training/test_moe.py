"""Mixtures of experts in the loop: auxiliary losses, statistics of routers, correction biases, and checkpoints under other layouts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megabridge.errors import ConfigError
from megabridge.parallel.topology import Topology
from tests.support.covering import further
from tests.support.rank_server import RankServer
from tests.support.resumed import assert_equal, trained, whole_tensors, without_padding

CASES = "tests.support.moe"
WRITTEN = Topology(dp=2, ep=2)
LAYOUTS = {
    "single": Topology(),
    "tp2ep2": Topology(tp=2, ep=2, etp=1),
    "etp2ep2": Topology(tp=2, dp=2, ep=2),
    "pp2ep2": Topology(pp=2, dp=2, ep=2),
    "ep4": Topology(dp=4, ep=4),
}


def run(
    ranks: RankServer, topology: Topology, folder: Path, *, options: dict[str, Any] | None = None, **kwargs: Any
) -> list[dict[str, Any]]:
    from tests.support import steady, tiny

    options = {**tiny.EXPERTS, **(options or {})}
    found = trained(ranks, topology, folder, options=options, optimizer={"eps": steady.EPSILON}, **kwargs)
    assert all(rank["steady"] for rank in found), "a router is near a tie"
    return found


@pytest.fixture(scope="module")
def written(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    """A run's folder after three of six steps under ep2, what its ranks held, and the run's other half."""
    folder = tmp_path_factory.mktemp("written")
    half = run(ranks, WRITTEN, folder / "run", steps=6, stop_after=3)
    shutil.copytree(folder / "run", folder / "rest")
    return folder / "run", half, run(ranks, WRITTEN, folder / "rest", steps=6, resume="auto")


@pytest.mark.parametrize("other", ["pp2ep2", *further(*(layout for layout in LAYOUTS if layout != "pp2ep2"))])
def test_another_layout_reads_the_same_bits_and_goes_on(
    ranks: RankServer, tmp_path: Path, written: tuple[Path, list[dict[str, Any]], list[dict[str, Any]]], other: str
) -> None:
    folder, half, rest = written
    shutil.copytree(folder, tmp_path / "run")
    read = ranks.run(f"{CASES}:loaded", topology=LAYOUTS[other], kwargs={"folder": str(tmp_path / "run")})
    for what in ("parameters", "optimizer"):
        assert_equal(without_padding(whole_tensors(read, what)), without_padding(whole_tensors(half, what)))

    moved = run(ranks, LAYOUTS[other], tmp_path / "run", steps=6, resume="auto")
    assert moved[0]["losses"] == pytest.approx(rest[0]["losses"], abs=1e-5)
    assert moved[0]["norms"] == pytest.approx(rest[0]["norms"], rel=1e-4)
    for rank in moved:  # what is said of routers depends on neither the layout nor the rank
        for step, expected in zip(rank["metrics"], rest[0]["metrics"], strict=True):
            routers = {name: value for name, value in expected.items() if name.startswith("router/")}
            assert {"router/aux_loss", "router/z_loss", "router/imbalance", "router/layer_3/imbalance"} <= routers.keys()
            assert {name: step[name] for name in step if name.startswith("router/")} == pytest.approx(routers, rel=1e-3)


def test_two_halves_equal_the_whole(
    ranks: RankServer, tmp_path: Path, written: tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]
) -> None:
    _, half, rest = written
    whole = run(ranks, WRITTEN, tmp_path, steps=6)
    for everything, before, after in zip(whole, half, rest, strict=True):
        assert before["losses"] + after["losses"] == everything["losses"]
        assert before["norms"] + after["norms"] == everything["norms"]
        assert_equal(after["parameters"], everything["parameters"])
        assert_equal(after["optimizer"], everything["optimizer"])


def test_either_kind_of_experts_reads_the_others_checkpoint(
    ranks: RankServer, tmp_path: Path, written: tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]
) -> None:
    folder, half, rest = written
    shutil.copytree(folder, tmp_path / "stacked")
    local = {"options": {"backend": "local"}}
    read = ranks.run(f"{CASES}:loaded", topology=LAYOUTS["pp2ep2"], kwargs={"folder": str(tmp_path / "stacked"), **local})
    for what in ("parameters", "optimizer"):
        assert_equal(without_padding(whole_tensors(read, what)), without_padding(whole_tensors(half, what)))
    moved = run(ranks, WRITTEN, tmp_path / "stacked", steps=6, resume="auto", **local)
    assert moved[0]["losses"] == pytest.approx(rest[0]["losses"], abs=1e-5)

    # And a folder that one parameter for each expert was written to.
    read = ranks.run(f"{CASES}:loaded", topology=Topology(dp=4, ep=4), kwargs={"folder": str(tmp_path / "stacked")})
    for what in ("parameters", "optimizer"):
        assert_equal(whole_tensors(read, what), whole_tensors(moved, what))


def test_auxiliary_losses_are_their_formulas(ranks: RankServer) -> None:
    (seen,) = ranks.run(f"{CASES}:auxiliary_losses")
    assert seen["steady"] and seen["loss"] == pytest.approx(seen["expected loss"], rel=1e-5)
    assert seen["metrics"] == pytest.approx(seen["expected metrics"], rel=1e-5)
    assert seen["gradients"] < 1e-6 < 1e-3 < seen["gradients without"], "the losses reach the gradients, weighed as written"
    assert seen["transformers"] == pytest.approx(seen["ours times topk"], rel=1e-5), "of one layer"


@pytest.mark.parametrize("layout", [Topology(), Topology(dp=2, ep=2), Topology(tp=2, ep=2, etp=1)], ids=str)
def test_a_correction_bias_moves_when_it_is_told_to(ranks: RankServer, tmp_path: Path, layout: Topology) -> None:
    ranks.run("tests.support.families:make", kwargs={"root": str(tmp_path), "architectures": ["DeepseekV3ForCausalLM"]})
    kwargs = {"source": str(tmp_path / "DeepseekV3ForCausalLM"), "out": str(tmp_path / "out")}
    for rank in ranks.run(f"{CASES}:moved_bias", topology=layout, kwargs=kwargs):
        assert rank["still"] == 0.0, "without moe_router_bias_update_rate"
        assert rank["live"] < 1e-7 and rank["exported"] < 1e-7, "by the rate, towards an even spread"
        assert rank["range"] == pytest.approx(rank["metrics"], abs=1e-6)


def test_a_correction_bias_stays_exact_in_bf16(ranks: RankServer, tmp_path: Path) -> None:
    ranks.run("tests.support.families:make", kwargs={"root": str(tmp_path), "architectures": ["DeepseekV3ForCausalLM"]})
    kwargs = {"source": str(tmp_path / "DeepseekV3ForCausalLM"), "out": str(tmp_path / "out")}
    (seen,) = ranks.run(f"{CASES}:bias_in_bf16", kwargs=kwargs)
    assert seen["dtypes"] == {"torch.float32"} and seen["weights"] == {"torch.bfloat16"}
    assert seen["live"] and all(seen["live"]) and all(seen["exported"])


def test_a_rate_without_a_bias_is_refused() -> None:
    from tests.support.llama import provider_of

    settings = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16, "moe_router_bias_update_rate": 0.01}
    with pytest.raises(ConfigError, match=r"moe_router_bias_update_rate=0\.01 moves no bias without moe_router_enable_expert_bias"):
        provider_of({}, settings).finalize()
