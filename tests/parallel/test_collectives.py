"""A failure on one rank is the same error on every rank, whatever was raised."""

from __future__ import annotations

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer


def test_every_rank_fails_whatever_one_of_them_raises(ranks: RankServer) -> None:
    """A text that no other process takes, one that can't be had at all, and what is no Exception."""
    others, own = ranks.run("tests.support.ranks:failing_together", topology=Topology(tp=2))
    assert others == [
        "ConfigError: rank 1 failed while trying: ConfigError: x=1 must be 2.",
        r"MegabridgeError: rank 1 failed while trying: KeyError: 'lost\ud800'",
        "MegabridgeError: rank 1 failed while trying: Aloof: gone",
        "MegabridgeError: rank 1 failed while trying: Mute: (its message can't be shown: ValueError)",
    ]
    assert [text.partition(":")[0] for text in own] == ["ConfigError", "KeyError", "Aloof", "Mute"]
