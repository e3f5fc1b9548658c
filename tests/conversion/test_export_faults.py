"""Exports and saves that are cut off, refused, run twice or meet a bad disk: what was published stays, what is published is whole."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megabridge.errors import CheckpointError
from megabridge.parallel.topology import Topology
from megabridge.storage import folders
from tests.support import disk
from tests.support.covering import GRID
from tests.support.models import TINY
from tests.support.payload import payload
from tests.support.rank_server import RankError, RankServer

CASES = "tests.support.faults"
SMALL = {**TINY, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "source"
    ranks.run("tests.support.models:write_model", kwargs={"folder": folder, "config": TINY})
    return folder


@pytest.fixture(scope="module")
def small(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    ranks.run("tests.support.models:write_model", kwargs={"folder": folder, "config": SMALL})
    return folder


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    """Ranks whose calls to the file system can be counted, killed and failed."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("watched")
    with pytest.MonkeyPatch.context() as patch, RankServer(folder, root=Path(__file__).parents[2]) as server:
        patch.setenv("LD_PRELOAD", str(disk.compiled(folder)))
        yield server


def exported(ranks: RankServer, source: Path, folder: Path) -> None:
    ranks.run("tests.support.export:exports", topology=Topology(), kwargs={"source": str(source), "outs": {str(folder): {}}})


def run(server: RankServer, case: str, *, timeout: float = 300, topology: Topology | None = None, **kwargs: Any) -> list[Any]:
    kwargs = {name: str(value) if isinstance(value, Path) else value for name, value in kwargs.items()}
    return server.run(f"{CASES}:{case}", topology=topology or Topology(), kwargs=kwargs, timeout=timeout)


@pytest.mark.cover
@pytest.mark.parametrize(
    "variant", [{}, {"fresh": True, "last": 15}, {"exchange": False, "last": 20}], ids=["replacing", "first", "without exchange"]
)
def test_fault_01_an_export_killed_at_any_call(watched: RankServer, small: Path, tmp_path: Path, variant: dict[str, Any]) -> None:
    """What was published is there until the new one is, whole; the next export resumes and leaves nothing behind."""
    (seen,) = run(watched, "killed_exports", source=small, root=tmp_path, share=1 if GRID or variant else 4, **variant)
    assert len(seen) == variant.get("last", len(seen)) and (variant or len(seen) > (60 if GRID else 25))
    before = "none" if variant.get("fresh") else "a"
    states = [point["state"] for point in seen]
    for number, point in enumerate(seen):
        assert point["code"] == -signal.SIGKILL, f"{number}: {point}"
        assert (point["code again"], point["after"], point["left"]) == (0, "b", []), f"{number}: {point}"
        if variant.get("exchange", True):
            assert point["state"] in (before, "b"), f"{number}: {point}"
        else:
            assert point["state"] in (before, "b") or (point["state"] == "none" and point["aside"]), f"{number}: {point}"
    assert states == sorted(states, key=[before, "none", "b"].index), "once published, it stays"
    assert {before, "b"} <= set(states)
    assert variant.get("exchange", True) or "none" in states
    kept = [point["again"]["kept"] for point in seen]
    assert all(point["again"]["kept"] + point["again"]["written"] == point["again"]["bytes"] for point in seen)
    last = states.index("b") - 1  # all was written there
    assert kept[last] == seen[last]["again"]["bytes"] and seen[last]["again"]["written"] == 0
    assert variant or (kept[0] == 0 and sum(0 < each < kept[last] for each in kept) > (10 if GRID else 3)), (
        "what is right is not written again"
    )


def test_fault_02_everything_is_durable_before_the_name(watched: RankServer, small: Path, tmp_path: Path) -> None:
    """Power loss drops what no fsync covered: file contents, and names in folders. At the rename nothing may be left to drop."""
    (log,) = run(watched, "logged_export", source=small, root=tmp_path)
    out = tmp_path / "live/new/deeper/out"
    published = []
    contents: set[Path] = set()  # files with writes that no fsync followed
    names: set[Path] = set()  # files and folders whose name in their folder isn't durable
    for call in disk.calls(Path(log)):
        if call.path.suffix == ".lock":
            continue  # what it says is for the living
        if call.kind in ("write", "allocate"):
            contents.add(call.path)
        elif call.kind in ("open", "mkdir"):
            names.add(call.path)
        elif call.kind == "fsync":
            contents.discard(call.path)
            names -= {name for name in names if name.parent == call.path}
        elif call.kind in ("rename", "exchange"):
            assert call.other == out
            below = {path for path in contents | names if path.is_relative_to(call.path)}
            assert below <= {call.path}, f"not durable at the rename: {below}"
            assert not {name for name in names if out.is_relative_to(name)}, "a folder above isn't durable"
            published.append(call.kind)
            names = {name for name in names if not name.is_relative_to(call.path)} | {out}
        elif call.kind == "unlink" and call.path.is_relative_to(folders.partial_of(out)):
            assert out not in names, "the old export goes when the rename is durable"
            contents.discard(call.path)
            names.discard(call.path)
    assert published == ["rename", "exchange"] and not names and not contents


def test_fault_03_and_04_a_disk_that_fails_at_any_call(watched: RankServer, small: Path, tmp_path: Path) -> None:
    """Full, over quota, read-only, broken, file too large: one typed error, nothing visible, the earlier export stays."""
    (seen,) = run(watched, "failing_disk", source=small, root=tmp_path)
    assert len(seen) > 80
    quiet = 0
    for point in seen:
        if point["raised"]:
            assert point["raised"].startswith("CheckpointError: ") and point["error"] in point["raised"], point
            # A disk that can't do the rename nor undo it: one of the two is there, whole.
            assert point["state"] == "a" or (point["state"] == "b" and "can't be published durably" in point["raised"]), point
            assert point["state"] == "a" or not point["once"], point
            assert point["hidden"] == [] or not point["once"], point
            if "writing the export failed" in point["raised"]:
                assert "it needs " in point["raised"] and " free" in point["raised"], point
        else:
            assert point["state"] == "b", point  # it was the removal of what isn't needed any more
            quiet += 1
    assert quiet < len(seen) / 4


def test_fault_03_a_full_file_system(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        ((raised, left), *_) = run(ranks, "full_disk", source=source, small=place, topology=Topology(tp=2))
    finally:
        subprocess.run(["umount", place], check=True)
    size = (source / "model.safetensors").stat().st_size
    assert raised.startswith("CheckpointError") and "No space left on device" in raised and left == []
    needed = int(raised.partition("it needs ")[2].split()[0])
    free = int(raised.partition("small has ")[2].split()[0])
    assert abs(needed - size) < 2000 and 200_000 < free < 300 * 1024


def test_fault_04_a_file_that_may_not_be_so_large(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    ((raised, left),) = run(ranks, "too_large_a_file", source=source, out=tmp_path / "out")
    assert raised.startswith("CheckpointError") and "File too large" in raised and left == []


@pytest.mark.cover
def test_fault_01_to_04_a_native_save(watched: RankServer, tmp_path: Path) -> None:
    """Killed or failing at any call but a share of the writes: the step before loads bit for bit until the new one does."""
    (seen,) = watched.run(
        f"{CASES}:native_saves", world_size=1, kwargs={"root": str(tmp_path), "share": 7 if GRID else 20}, timeout=400
    )
    latest = [point["latest"] for point in seen["killed"]]
    assert all(point["code"] == -signal.SIGKILL and point["hidden"] == [] for point in seen["killed"]), seen["killed"]
    assert latest == sorted(latest) and set(latest) == {1, 2}
    for point in seen["failed"]:
        assert point["code"] == 0, point
        found = point["found"]
        if found["raised"]:
            # torch's own writer doesn't say what the disk said; the bytes needed and free stand there always
            assert found["raised"].startswith("CheckpointError: ") and "/step_2/" in found["raised"], point
            if "starting" not in found["raised"] and "can't be made" not in found["raised"]:
                assert "it needs " in found["raised"] and " free" in found["raised"], point
            assert found["latest"] == 1 and point["hidden"] == [], point
        else:
            assert found["latest"] == 2, point
    assert sum(point["error"] in point["found"]["raised"] for point in seen["failed"]) > len(seen["failed"]) * 0.5
    assert sum(bool(point["found"]["raised"]) for point in seen["failed"]) > len(seen["failed"]) * 0.7


@pytest.mark.parametrize("rank", [0, 1])
def test_fault_06_a_rank_that_dies_in_an_export(
    ranks: RankServer, source: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, rank: int
) -> None:
    """All end at once, the rank is named, and the next export resumes what was written."""
    there = tmp_path_factory.mktemp("there") / "written"
    exported(ranks, source, tmp_path / "out")
    before = payload(tmp_path / "out")
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        dying = {"source": source, "out": tmp_path / "out", "there": there, "rank": rank, "after": 20}
        run(ranks, "dying_export", **dying, topology=Topology(tp=2), timeout=60)
    assert caught.value.failure["rank"] == rank and caught.value.failure["exit_code"] == -signal.SIGKILL
    assert time.monotonic() - begin < 30
    assert payload(tmp_path / "out") == before and (tmp_path / ".out.partial").is_dir()
    outs = {str(tmp_path / "out"): {}}
    seen = ranks.run("tests.support.export:exports", topology=Topology(pp=2), kwargs={"source": str(source), "outs": outs})
    assert seen[0][0]["kept"] > 0 and seen[0] == seen[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] and payload(tmp_path / "out") == before


def test_fault_08_two_exports_to_one_folder(ranks: RankServer, small: Path, tmp_path: Path) -> None:
    (seen,) = run(ranks, "two_exports", source=small, root=tmp_path)
    assert seen["second"][0].startswith("CheckpointError: ") and "is being written by another process" in seen["second"][0]
    assert seen["second"][1] == "a" and seen["first"] == [0, "b", []]
    assert seen["killed"] == ["a", [".out.lock", ".out.partial"]]
    report, *rest = seen["after"]
    assert rest == ["b", []] and report["written"] == 0 and report["kept"] == report["bytes"]


def test_fault_08_the_lock_is_held_until_the_last_rank_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first, token = folders.claim(folder)
    other = folders.join(folder, token)
    first.close()  # rank 0 died
    with pytest.raises(CheckpointError, match="is being written by another process"):
        folders.claim(folder)
    other.close()
    again, _ = folders.claim(folder)
    waiting = (tmp_path / ".out.lock").open("a+")  # opened before the lock goes, locked after
    folders.release(folder, again)
    assert not (tmp_path / ".out.lock").exists()
    file, _ = folders.claim(folder)
    waiting.close()
    folders.release(folder, file)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_do_not_see_one_folder_are_told_what_to_set(ranks: RankServer, small: Path, tmp_path: Path) -> None:
    for name in ("zero", "one"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / ".out.lock").write_text("left by another export")
    outs = [str(tmp_path / name / "out") for name in ("zero", "one")]
    seen = run(ranks, "apart", source=small, outs=outs, topology=Topology(pp=2))
    for raised, seconds in seen:
        assert raised.startswith("CheckpointError: ") and "set conversion.writer=gather" in raised and seconds < 20
    assert "rank 1 failed while opening the folder" in seen[0][0]
    assert [path.name for path in tmp_path.glob("*/*")] == [".out.lock"], "rank 0 removed its own"


def test_fault_19_what_is_no_number_is_not_published(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    seen = run(ranks, "not_finite", source=source, root=tmp_path, topology=Topology(tp=2, pp=2))
    nan, infinite, large = "model.layers.3.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"
    for rank in seen:
        assert rank == seen[0]
    refused, half = seen[0]["refused"], seen[0]["half"]
    assert refused.startswith("ParityError: ") and "allow_nonfinite=True" in refused and seen[0]["left"] == []
    assert f"{nan}: NaN or infinite values" in refused and f"{infinite}: NaN or infinite values" in refused and large not in refused
    assert f"{large}: finite, but too large for torch.float16" in half
    assert seen[0]["allowed"] == ""
    tensors = load_file(tmp_path / "allowed/model.safetensors")
    assert sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()) == sorted([nan, infinite])
    assert tensors[infinite].min() == float("-inf") and tensors[nan].isnan().any()


def test_fault_32_names_and_modes(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "empty").mkdir()
    exported(ranks, source, tmp_path / "earlier")
    shutil.copytree(tmp_path / "earlier", tmp_path / "foreign")
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    seen = run(ranks, "odd_places", source=source, root=tmp_path, umask=0o027, topology=Topology(tp=2))
    refused = {"too long": "File name too long", "a file": "is a file", "below a file": "", "foreign": "thesis.tex"}
    for name, raised in seen[0].items():
        if name in refused:
            assert raised.startswith("CheckpointError: ") and refused[name] in raised, f"{name}: {raised}"
        else:
            assert raised == "", f"{name}: {raised}"
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "years of work" and (tmp_path / "link").is_symlink()
    expected = payload(source)
    found = [path.parent for path in tmp_path.rglob("megabridge.json") if path.parent.name != "foreign"]
    assert len(found) == len(seen[0]) - len(refused) and tmp_path / "target" in found
    for folder in found:
        assert payload(folder) == expected
        assert folder.stat().st_mode & 0o777 == 0o750
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    assert not [path for path in tmp_path.rglob(".*")]
