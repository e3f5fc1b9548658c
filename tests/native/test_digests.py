"""A native checkpoint in which a bit, a box or a file is not what was saved is refused while it is loaded, under any layout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megabridge.errors import CheckpointError
from megabridge.hf.safetensors_format import read_header
from megabridge.native import digests
from megabridge.parallel.topology import Topology
from tests.support.damage import DAMAGES
from tests.support.rank_server import RankServer

CASES = "tests.support.damage"
FOUND = {
    "none": "nothing was raised",
    "weight": "have other bytes than were saved:\n  __0_0.distcp: decoder.layers.mlp.linear_fc1.weight from [0, 0, 0]",
    "norm": "__0_0.distcp: decoder.final_layernorm.weight from [0]",
    "master": "distcp: optimizer.state.param.",
    "moment": "distcp: optimizer.state.exp_avg_sq.",
    "common": "__0_0.distcp: common_state",
    "another step's file": "__0_0.distcp",  # its size may be another, too
    "another step's metadata": "must belong to the same save as megabridge_digests.json beside it",
    "another step's digests": "must belong to the same save as megabridge_digests.json beside it",
    "another step's metadata and digests": "have other bytes than were saved",
    "no digests": "was saved with digests of what is in it, but megabridge_digests.json is missing",
    "a changed digest": "its own digest is another",
    "no JSON": "megabridge_digests.json must be valid JSON",
    "of no save": "megabridge_digests.json is of save other, not ",
    "a box without": "boxes, but lacks 1; use another step",
    "a bit of the metadata": "must belong to the same save as megabridge_digests.json beside it",
    "the marker": "metadata.json has other bytes than were written",
}
UNREAD = ("master", "moment", "common")
"""What a load of the weights alone doesn't read."""


@pytest.fixture(scope="module")
def saved(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under tp2 with steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    kwargs = {"run_dir": str(folder), "steps": 4, "save_every": 2}
    ranks.run("tests.support.training:run", topology=Topology(tp=2), kwargs=kwargs)
    return folder / "checkpoints"


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(), Topology(pp=2)], ids=str)
def test_what_is_not_what_was_saved_is_refused(ranks: RankServer, saved: Path, tmp_path: Path, topology: Topology) -> None:
    assert FOUND.keys() == DAMAGES.keys()
    kwargs = {"native_folder": str(saved / "step_4/native"), "other": str(saved / "step_2/native"), "scratch": str(tmp_path)}
    with_optimizer = topology.pp == 1
    for said in ranks.run(f"{CASES}:loads", topology=topology, kwargs={**kwargs, "with_optimizer": with_optimizer}):
        for name, part in FOUND.items():
            expected = part if with_optimizer or name not in UNREAD else "nothing was raised"
            assert expected in said[name], f"{name}: {said[name]}"
            assert expected == "nothing was raised" or "CheckpointError: " in said[name]


def test_without_digests_a_folder_is_taken_as_it_is(ranks: RankServer, saved: Path, tmp_path: Path) -> None:
    kwargs = {"native_folder": str(saved / "step_4/native"), "scratch": str(tmp_path)}
    (said,) = ranks.run(f"{CASES}:without_digests", topology=Topology(), kwargs=kwargs)
    assert said[:2] == ["nothing was raised"] * 2
    assert said[2].startswith("CheckpointError: ") and "can't be read" in said[2]
    assert said[3] == "interrupted"


def test_tensors_have_one_digest_in_whichever_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: torch.arange(number, number + 3000, dtype=torch.float32) for number, name in enumerate("abc")}
    monkeypatch.setattr(digests, "_PIECE", 4096)

    def digest(name: str, **files: list[str]) -> str:
        (tmp_path / name).mkdir()
        for file, names in files.items():
            save_file({each: tensors[each] for each in names}, tmp_path / name / f"{file}.safetensors")
        headers = [read_header(path) for path in sorted((tmp_path / name).iterdir())]
        infos = {each: info for header in headers for each, info in header.items()}
        found = digests.of_tensors(infos.values())
        path = next(iter(infos.values())).file
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(1, 1))
        with pytest.raises(CheckpointError, match="is not the file that it was"):
            digests.of_tensors(infos.values())
        return found

    base = digest("one", model=["a", "b", "c"])
    assert digest("two", x=["c", "a"], y=["b"]) == base
    tensors["b"][2999] += 1
    assert digest("three", model=["a", "b", "c"]) != base
    tensors["b"][2999] -= 1
    tensors["b"], tensors["c"] = tensors["c"], tensors["b"]
    assert digest("four", model=["a", "b", "c"]) != base
