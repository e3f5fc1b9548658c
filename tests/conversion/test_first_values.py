"""A model with random weights begins the same under every layout, with the distributions of its config."""

from __future__ import annotations

import pytest

from megabridge.families import all_families
from megabridge.parallel.topology import Topology
from tests.support.covering import cover
from tests.support.families import MIXTURES
from tests.support.rank_server import RankServer

DENSE = {"tp2": Topology(tp=2), "tp2pp2": Topology(tp=2, pp=2), "pp2vpp2": Topology(pp=2, vpp=2)}
EXPERTS = {"tp2pp2": Topology(tp=2, pp=2), "ep2": Topology(dp=2, ep=2), "etp2ep2": Topology(tp=2, ep=2, etp=2, dp=2)}
COVER = cover(sorted(all_families().keys() - {*MIXTURES}), list(DENSE))
MIXED = ["MixtralForCausalLM", "DeepseekV3ForCausalLM", "Qwen2MoeForCausalLM"]
CASES = [(layout, COVER[name]) for name, layout in DENSE.items()] + [(layout, MIXED) for layout in EXPERTS.values()]
CASES.append((Topology(dp=2, ep=2), ["GptOssForCausalLM"]))


@pytest.fixture(scope="module")
def alone(ranks: RankServer) -> dict[str, dict[str, str]]:
    """What one process begins with."""
    names = sorted({name for _, names in CASES for name in names})
    (found,) = ranks.run("tests.support.first_values:digests", kwargs={"architectures": names}, timeout=300)
    result: dict[str, dict[str, str]] = found
    return result


@pytest.mark.parametrize(("layout", "names"), CASES, ids=lambda case: str(case) if isinstance(case, Topology) else "")
def test_random_weights_do_not_depend_on_the_layout(
    ranks: RankServer, alone: dict[str, dict[str, str]], layout: Topology, names: list[str]
) -> None:
    results = ranks.run("tests.support.first_values:digests", topology=layout, kwargs={"architectures": names}, timeout=300)
    different = {
        f"{name}: {key}"
        for found in results
        for name in names
        for key in alone[name].keys() | found[name].keys()
        if alone[name].get(key) != found[name].get(key)
    }
    assert not different


def test_random_weights_have_the_configs_spread_and_follow_from_the_seed(ranks: RankServer) -> None:
    (found,) = ranks.run("tests.support.first_values:spreads")
    assert len(found) > 10
    for name, seen in found.items():
        assert seen["deviation"] == pytest.approx(1, abs=0.02) and abs(seen["mean"]) < 0.02, name
        assert 3.5 < seen["largest"] < 7, name
        assert seen["repeated"] < 0.05 * 2001 * 512, name  # floats of equal value, but no tile twice
        assert seen["rounded"] and seen["same"] < 1e-3, name
