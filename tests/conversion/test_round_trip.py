"""Hugging Face -> Megatron -> Hugging Face, byte for byte, under every layout; logits as transformers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megabridge.parallel.topology import Topology
from tests.support.covering import GRID
from tests.support.models import TINY, llama_config
from tests.support.payload import identical, payload
from tests.support.rank_server import RankServer

LAYOUTS = [*(Topology(tp=tp, pp=pp) for pp in (1, 2) for tp in (1, 2, 4)), Topology(tp=2, pp=2, vpp=2)]
COUNT = 54 if GRID else 9
"""Random shapes."""


@pytest.mark.cover
@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=COUNT, max_size=COUNT, unique=True))
@settings(max_examples=1, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_random_configs_under_every_layout(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory, seeds: list[int]) -> None:
    root = tmp_path_factory.mktemp("models")
    configs = [llama_config(seed) for seed in seeds]
    assert len({json.dumps(config) for config in configs}) >= COUNT * 50 / 54, "the drawn shapes must differ"
    ranks.run("tests.support.convert:make_models", kwargs={"root": str(root), "seeds": seeds}, timeout=300)
    sources = [payload(root / str(number)) for number in range(COUNT)]
    first = root / str(LAYOUTS[0])
    for layout in LAYOUTS:
        out = root / str(layout)
        kwargs = {"root": str(root), "out": str(out), "seeds": seeds}
        seen: list[list[dict[str, Any]]] = ranks.run(
            "tests.support.convert:round_trips", topology=layout, kwargs=kwargs, timeout=300
        )
        for number in range(COUNT):
            where = f"{layout}, {configs[number]}"
            assert payload(out / str(number)) == sources[number], where
            assert json.loads((out / str(number) / "config.json").read_text()) == configs[number], where
            for rank in seen:
                assert rank[number]["logits"] <= 1e-4 * max(1.0, rank[number]["scale"]), where
                assert rank[number]["mismatched"] == ()
            copied, owned = seen[0][number]["copied"], sum(rank[number]["owned"] for rank in seen)
            assert copied == owned, f"{where}: ranks copied {copied} bytes and own {owned}"
        if out != first:
            assert identical(first, out)
            shutil.rmtree(out)


@pytest.mark.parametrize("layout", [Topology(tp=2, pp=2), Topology(pp=2, vpp=2)], ids=str)
def test_the_export_comes_from_the_model_alone(ranks: RankServer, tmp_path: Path, layout: Topology) -> None:
    ranks.run("tests.support.models:write_model", kwargs={"folder": tmp_path / "source", "config": TINY})
    before = payload(tmp_path / "source")
    ranks.run(
        "tests.support.convert:negated_export",
        topology=layout,
        kwargs={"source": str(tmp_path / "source"), "out": str(tmp_path / "out")},
    )
    after = payload(tmp_path / "out")
    assert after.keys() == before.keys()
    for name, (dtype, shape, data) in before.items():
        flipped = bytes(byte ^ 0x80 if place % 4 == 3 else byte for place, byte in enumerate(data))  # the sign bit of an fp32
        assert after[name] == (dtype, shape, flipped), name
