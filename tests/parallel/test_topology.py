"""Topology agrees with megatron-core's own rank order, and refuses what can't be."""

from __future__ import annotations

from itertools import product

import pytest

from megabridge.errors import ConfigError
from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer


@pytest.mark.parametrize("sizes", product((1, 2, 3), (1, 2), (1, 2), (1, 2)))
def test_rank_and_coordinate_are_inverse(sizes: tuple[int, int, int, int]) -> None:
    tp, pp, cp, dp = sizes
    topology = Topology(tp=tp, pp=pp, cp=cp, dp=dp)
    for rank in range(topology.world_size):
        at = topology.coordinate(rank)
        assert topology.rank(tp=at.tp, cp=at.cp, dp=at.dp, pp=at.pp) == rank


@pytest.mark.parametrize(
    "topology", [Topology(tp=2, pp=2, dp=2), Topology(tp=2, ep=2, etp=1, dp=2), Topology(tp=2, ep=2, dp=2)], ids=str
)
def test_megatron_core_places_ranks_alike(ranks: RankServer, topology: Topology) -> None:
    seen = ranks.run("tests.support.topology:coordinate", topology=topology)
    assert [topology.coordinate(rank) for rank in range(topology.world_size)] == seen


def test_sizes_follow_from_the_world() -> None:
    assert Topology.for_world(16, tp=4, pp=2) == Topology(tp=4, pp=2, dp=2)
    with pytest.raises(ConfigError, match="tp x pp x cp = 8 must divide the number of processes, 12"):
        Topology.for_world(12, tp=4, pp=2)
    with pytest.raises(ConfigError, match="needs 16 processes, but there are 8"):
        Topology.for_world(8, tp=8, dp=2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"tp": 0}, "parallel.tp=0"), ({"vpp": 2}, "needs pp > 1"), ({"tp": 2, "ep": 4, "dp": 2}, "etp x ep = 2 x 4 must divide")],
)
def test_impossible_sizes(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Topology(**sizes)


def test_sizes_travel_by_their_names_and_megatrons_and_come_back() -> None:
    layouts = (Topology(), Topology(tp=2, pp=2, vpp=2, dp=3), Topology(tp=2, ep=2, etp=1), Topology(tp=2, cp=2, ep=8, dp=4))
    for topology in layouts:
        assert Topology.of_sizes(topology.sizes()) == topology
        assert Topology.of_settings(topology.settings().__getitem__, topology.world_size) == topology
    assert Topology(tp=2, etp=2) == Topology(tp=2) and Topology(tp=2).sizes()["etp"] == 2
    assert Topology.of_sizes({"tp": 2, "dp": 3}) == Topology(tp=2, dp=3), "as files have it that were written without etp"
    for wrong in ({"tp": "2"}, {"tp": True}, {"xp": 2}, [2], {"dp": 0}):
        with pytest.raises(ConfigError):
            Topology.of_sizes(wrong)  # type: ignore[arg-type]
    settings = Topology(ep=8, dp=8).settings()
    assert Topology.of_settings(settings.__getitem__) == Topology(ep=8, dp=8), (
        "the fewest ranks that have so many shares of experts"
    )
    with pytest.raises(ConfigError, match=r"(?s)parallel\.tp=0 must .*parallel\.ep=None must"):
        Topology.of_settings({**settings, "tensor_model_parallel_size": 0, "expert_model_parallel_size": None}.__getitem__)


def test_names() -> None:
    assert [str(t) for t in (Topology(), Topology(tp=2, pp=2, vpp=2, dp=3), Topology(tp=2, ep=2, etp=1))] == [
        "single",
        "tp2pp2vpp2dp3",
        "tp2ep2etp1",
    ]


def test_names_are_read_back() -> None:
    for topology in (Topology(), Topology(tp=2, pp=2, vpp=2, dp=3), Topology(tp=2, ep=2, etp=1)):
        assert Topology.parse(str(topology)) == topology
    for text in ("", "tp", "tp2 pp2", "tp2tp2", "2tp", "singletp2", "xtp2"):
        with pytest.raises(ConfigError, match="must read like single, tp2 or tp2pp2vpp2"):
            Topology.parse(text)
