"""Every family with experts, under every kind of layout: bytes, logits, gradients, and steps that lower the loss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megabridge.parallel.topology import Topology
from tests.support.covering import GRID, cover
from tests.support.families import MIXTURES
from tests.support.payload import payload
from tests.support.rank_server import RankServer

LAYOUTS = {
    "single": Topology(),
    "tp2": Topology(tp=2),
    "pp2": Topology(pp=2),
    "pp2vpp2": Topology(pp=2, vpp=2),
    "ep2": Topology(ep=2, dp=2),
    "tp2ep2": Topology(tp=2, ep=2, etp=1),
    "pp2ep2": Topology(pp=2, ep=2, dp=2),
    "ep4": Topology(ep=4, dp=4),
    "etp2ep2": Topology(tp=2, ep=2, etp=2, dp=2),
}
FAMILIES = [name for name in MIXTURES if ":" not in name]
COVER = cover(MIXTURES, list(LAYOUTS))
VARIED = ("single", "tp2ep2", "pp2")  # of all layouts those that show what variants compute: they are cut as their families are


@pytest.fixture(scope="module")
def sources(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("mixtures")
    ranks.run("tests.support.families:make", kwargs={"root": str(root), "architectures": MIXTURES}, timeout=900)
    return root


@pytest.mark.cover
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_logits_and_gradients(layout: str, sources: Path, ranks: RankServer, tmp_path: Path) -> None:
    chosen = [name for name in COVER[layout] if not GRID or name in FAMILIES or layout in VARIED]
    names = [name for name in chosen if is_legal(layout, name)]
    kwargs = {"root": str(sources), "out": str(tmp_path), "architectures": names}
    results = ranks.run("tests.support.families:checks", topology=LAYOUTS[layout], kwargs=kwargs, timeout=600)
    wrong = sorted({line for problems in results for line in problems})
    wrong += [f"{name}: the export differs" for name in names if payload(tmp_path / name) != payload(sources / name)]
    assert not wrong, "\n".join(wrong)


def is_legal(layout: str, name: str) -> bool:
    """megatron-core has no expert tensor parallelism for experts with biases."""
    return LAYOUTS[layout].expert_tp == 1 or not name.startswith("GptOss")


@pytest.mark.cover
def test_steps_lower_the_loss(sources: Path, ranks: RankServer) -> None:
    kwargs = {"root": str(sources), "architectures": [name for name in COVER["ep2"] if name in FAMILIES], "steps": 4}
    losses = ranks.run("tests.support.families:losses", topology=Topology(ep=2, dp=2), kwargs=kwargs, timeout=600)[0]
    assert not {name: values for name, values in losses.items() if values[-1] > values[0] - 0.1}


@pytest.mark.cover
def test_native_checkpoints_are_read_under_another_layout(sources: Path, ranks: RankServer, tmp_path: Path) -> None:
    written = [name for name in COVER["tp2ep2"] if name in FAMILIES]
    kwargs = {"root": str(sources), "out": str(tmp_path / "native"), "architectures": written}
    ranks.run("tests.support.families:save_native", topology=LAYOUTS["tp2ep2"], kwargs=kwargs, timeout=600)
    for layout in ("pp2ep2", "tp2"):
        names = [name for name in written if is_legal(layout, name)]
        kwargs = {"native": str(tmp_path / "native"), "out": str(tmp_path / layout), "architectures": names}
        ranks.run("tests.support.families:export_native", topology=LAYOUTS[layout], kwargs=kwargs, timeout=600)
        assert not [name for name in names if payload(tmp_path / layout / name) != payload(sources / name)]
