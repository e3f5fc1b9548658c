"""Token ids that the model doesn't have end a run on every rank at once, whatever the layout: in a batch's tokens and its labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer
from tests.support.tiny import VOCABULARY

CALLS: list[dict[str, Any]] = [
    {"number": number, "part": part, "is_validation": is_validation}
    for number, part, is_validation in (
        (VOCABULARY, "tokens", False),
        (-1, "tokens", False),
        (63, "labels", False),  # within the padded rows
        (-100, "tokens", False),
        (10**9, "tokens", True),
        (VOCABULARY, "labels", True),
        (1, "nothing", False),
        (2, "nothing", True),
        (-100, "labels", False),  # has no loss
    )
]


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2), Topology(pp=2), Topology(dp=2)], ids=str)
def test_ids_beyond_the_vocabulary(ranks: RankServer, tmp_path: Path, topology: Topology) -> None:
    given = {"run_dir": str(tmp_path), "calls": CALLS}
    said = ranks.run("tests.support.training:beyond", topology=topology, kwargs=given)
    last = len(said) - 1 if topology.dp > 1 else 0
    for number, call in enumerate(CALLS[:-1]):
        where = "micro-batch 0" if call["is_validation"] and topology.dp > 1 else f"micro-batch {2 if call['is_validation'] else 1}"
        rule = f"{where} of this rank: {call['part']}[1, 0]: token id {call['number']} must be below the model's"
        rule = f"{rule} vocab_size=61" if call["part"] != "nothing" else f"file {call['number']} can't be read."
        for rank, texts in enumerate(said):
            assert texts[number].startswith("ConfigError: ") and rule in texts[number], (call, texts[number])
            if rank != last and topology.dp > 1:
                assert f"rank {last} failed while" in texts[number]
    for texts in said:
        assert texts[-2] == "", "an ignored label is none of the model's tokens"
        assert texts[-1].startswith("tokens[0, 2]: token id 61 must be below the model's")
