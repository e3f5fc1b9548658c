"""Where there is no room for a save: what is said before the first step, which saves are left out, and that the last one isn't."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megabridge.parallel.topology import Topology
from megabridge.storage import disk_room
from tests.support.rank_server import RankServer

CASES = "tests.support.full_disk"
SIZE = 900_000
"""Bytes: more than a save of the tiny model has."""


def run(ranks: RankServer, folder: Path, *, size: int = 1, **more: Any) -> dict[str, Any]:
    results = ranks.run(f"{CASES}:run", topology=Topology(dp=size), kwargs={"run_dir": str(folder), **more})
    found: dict[str, Any] = results[0]
    return found


def test_the_bytes_of_a_save_are_known_before_the_first_step(ranks: RankServer, tmp_path: Path) -> None:
    for topology in (Topology(dp=2), Topology(tp=2)):
        results = ranks.run(f"{CASES}:sizes", topology=topology, kwargs={"run_dir": str(tmp_path / str(topology))})
        for name, before, written in results[0]:
            assert before == written, (str(topology), name)


def test_a_run_that_cannot_save_is_refused_before_its_first_step(ranks: RankServer, tmp_path: Path) -> None:
    found = run(ranks, tmp_path / "run", steps=2, room={"run": 1000})
    assert re.match(
        r"a save of this run needs [\d.]+ kB, and .*/run/checkpoints has 1\.00 kB free; free [\d.]+ kB there, or set "
        r"checkpoint\.path to a folder on another disk",
        found["failed"],
    )
    assert found["step"] == 0 and found["saved"] == []
    found = run(ranks, tmp_path / "unsaved", steps=2, room={"unsaved": 1000}, save_at_end=False)
    assert found["step"] == 2 and not found["failed"]
    found = run(ranks, tmp_path / "many", steps=4, room={"many": SIZE}, save_every=1)
    assert (
        any(line.startswith("4 saves of this run needs") and "keep_last" in line for line in found["said"]) and found["step"] == 4
    )
    found = run(ranks, tmp_path / "few", steps=4, room={"few": SIZE}, save_every=1, keep_last=1)
    assert not any("keep_last" in line for line in found["said"])


def test_fault_03_a_full_disk_at_the_last_save_loses_nothing(ranks: RankServer, tmp_path: Path) -> None:
    """One on the way is left out; the last one waits, on every rank, and is what it would have been."""
    whole = run(ranks, tmp_path / "a" / "whole", size=2, steps=4, save_every=2)
    found = run(ranks, tmp_path / "b" / "full", size=2, steps=4, save_every=2, full=(2, 4))
    assert found["step"] == 4 and found["saved"] == ["full/checkpoints/step_4/native"] and not found["failed"]
    (left_out,) = [line for line in found["said"] if line.startswith("step 2 is not saved, and the run goes on: ")]
    (waits,) = [line for line in found["said"] if line.startswith("the last save waits for room: saving step 4 needs ")]
    assert "File too large" in left_out and "File too large" in waits
    more: dict[str, Any] = {"steps": 6, "size": 2, "resume": "auto"}
    after, expected = run(ranks, tmp_path / "b" / "full", **more), run(ranks, tmp_path / "a" / "whole", **more)
    assert [step["train/loss"] for step in after["losses"]] == [step["train/loss"] for step in expected["losses"]]
    assert len(whole["losses"]) == 4 and len(after["losses"]) == 2


def test_fault_03_a_run_that_shall_fail_does(ranks: RankServer, tmp_path: Path) -> None:
    found = run(ranks, tmp_path / "run", steps=4, save_every=2, full=(2,), on_full_disk="fail")
    assert found["step"] == 2 and "step_2/native can't be written: " in found["failed"] and found["saved"] == []


def test_a_save_without_room_goes_to_the_spare_disk_and_is_resumed_from_there(ranks: RankServer, tmp_path: Path) -> None:
    spare = {"spare_path": str(tmp_path / "spare")}
    found = run(ranks, tmp_path / "run", steps=2, room={"run": 1000}, **spare)
    (saved,) = found["saved"]
    assert re.fullmatch(r"spare/run-[0-9a-f]{8}/step_2/native", saved)
    assert any(line.startswith(f"saves go to {tmp_path}/spare/run-") and "has 1.00 kB free" in line for line in found["said"])
    again = run(ranks, tmp_path / "run", steps=3, resume="auto", **spare)
    assert f"resumed from {tmp_path}/{saved} at step 2" in again["said"] and len(again["losses"]) == 1
    assert again["saved"] == ["run/checkpoints/step_3/native", saved]
    other = run(ranks, tmp_path / "elsewhere" / "run", steps=3, resume="auto", **spare)
    assert len(other["losses"]) == 3, "another run of that name has a folder of its own"


def test_what_may_go_is_named_with_its_size(tmp_path: Path) -> None:
    for name, size in (("step_1", 5000), ("step_2", 90_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x" * size)
    free = disk_room.free_bytes(tmp_path)
    said = disk_room.problem(tmp_path / "not" / "yet", 3 * free, "it", removable=[tmp_path / "step_1", tmp_path / "step_2"])
    assert re.search(
        r"it needs [\d.]+ \wB, and .*/not/yet has .*; free [\d.]+ \wB there, for instance step_2 \([\d.]+ kB\) or step_1", said
    )
    assert disk_room.problem(tmp_path, 1, "it") == "" and "a quota" in disk_room.problem(tmp_path, 1, "it", failed="no")
