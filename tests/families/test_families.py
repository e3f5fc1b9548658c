"""Every family, under every kind of layout: bytes, logits, gradients, and steps that lower the loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megabridge.families import all_families
from megabridge.parallel.topology import Topology
from tests.support.covering import GRID, cover, mechanisms
from tests.support.families import MIXTURES, VARIANTS
from tests.support.payload import payload
from tests.support.rank_server import RankServer

ARCHITECTURES = sorted({*all_families(), *VARIANTS} - {*MIXTURES})
LAYOUTS = {
    "single": Topology(),
    "tp2": Topology(tp=2),
    "pp2": Topology(pp=2),
    "tp4": Topology(tp=4),
    "tp2pp2": Topology(tp=2, pp=2),
    "pp2vpp2": Topology(pp=2, vpp=2),
}
COVER = cover(ARCHITECTURES, list(LAYOUTS))


@pytest.fixture(scope="module")
def sources(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("families")
    ranks.run("tests.support.families:make", kwargs={"root": str(root), "architectures": ARCHITECTURES}, timeout=900)
    return root


def test_every_mechanism_is_met_under_every_layout_and_every_family_somewhere() -> None:
    everything = set[str]().union(*map(mechanisms, ARCHITECTURES))
    assert all(set[str]().union(*map(mechanisms, names)) == everything for names in COVER.values())
    assert set[str]().union(*COVER.values()) == {*ARCHITECTURES} and len(everything) > 50
    assert GRID or max(map(len, COVER.values())) < len(ARCHITECTURES) / 2


@pytest.mark.cover
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_logits_and_gradients(layout: str, sources: Path, ranks: RankServer, tmp_path: Path) -> None:
    names = COVER[layout]
    kwargs = {"root": str(sources), "out": str(tmp_path), "architectures": names}
    results = ranks.run("tests.support.families:checks", topology=LAYOUTS[layout], kwargs=kwargs, timeout=600)
    wrong = sorted({line for problems in results for line in problems})
    wrong += [f"{name}: the export differs" for name in names if payload(tmp_path / name) != payload(sources / name)]
    assert not wrong, "\n".join(wrong)
    for name in names:  # with the same bytes, all that transformers could read otherwise
        assert json.loads((tmp_path / name / "config.json").read_text()) == json.loads((sources / name / "config.json").read_text())


@pytest.mark.cover
def test_steps_lower_the_loss(sources: Path, ranks: RankServer) -> None:
    kwargs = {"root": str(sources), "architectures": COVER["tp2"], "steps": 4}
    (losses, _) = ranks.run("tests.support.families:losses", topology=Topology(tp=2), kwargs=kwargs, timeout=600)
    assert not {name: values for name, values in losses.items() if values[-1] > values[0] - 0.1}


SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "n_embd", "n_head")


@pytest.mark.parametrize("architecture", sorted(all_families()))
def test_a_config_of_sizes_alone_means_what_transformers_takes_it_for(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    family = all_families()[architecture]
    bare = {"architectures": [architecture], "model_type": family.model_type}
    bare |= {key: value for key, value in family.tiny.items() if key in SIZES}
    bare |= {"n_layer" if "n_embd" in bare else "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    assert family.native(bare) == family.native(AutoConfig.from_pretrained(tmp_path).to_dict())
