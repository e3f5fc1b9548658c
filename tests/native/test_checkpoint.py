"""Native folders: nothing in them runs, what is damaged is refused before a weight is touched, and a killed save is as if it had not been."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megabridge.errors import CheckpointError
from megabridge.native import digests, reader, safe_unpickling
from megabridge.parallel.topology import Topology
from megabridge.storage import folders, steps
from tests.support.rank_server import RankError, RankServer

CASES = "tests.support.training"


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def saved(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under tp2 with steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(f"{CASES}:run", topology=Topology(tp=2), kwargs={"run_dir": str(folder), "steps": 4, "save_every": 2})
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def refused(ranks: RankServer, run: Path, message: str, *, function: str = "loaded") -> None:
    with pytest.raises(RankError, match=message):
        ranks.run(f"{CASES}:{function}", topology=Topology(tp=2), kwargs={"folder": str(run)})


def test_a_folder_is_what_megatron_core_reads(saved: Path, ranks: RankServer) -> None:
    native = saved / "checkpoints/step_4/native"
    ours = {digests.FILE, ".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp"}
    assert {entry.name for entry in native.iterdir()} == ours
    assert ranks.run(f"{CASES}:read_by_megatron", topology=Topology(), kwargs={"folder": str(saved)}) == [True]


def test_fault_22_a_payload_in_the_metadata_is_not_run(run: Path, ranks: RankServer, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    native = run / "checkpoints/step_4/native"
    rewrite_metadata(native, lambda _: Payload(f"touch {trace}"))
    refused(ranks, run, r"asks for (posix|os)\.system, which is not part of a checkpoint's metadata")
    assert not trace.exists()


def test_fault_22_a_payload_in_an_object_is_not_run(run: Path, ranks: RankServer, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    plant(run / "checkpoints/step_4/native", "common_state", Payload(f"touch {trace}"))
    refused(ranks, run, r"(?s)Weights only load failed.*system")
    assert not trace.exists()


def rewrite_metadata(native: Path, change: Callable[[Any], Any]) -> None:
    """Writes the metadata of a folder anew, and takes its digests away as if another program had written it."""
    metadata = pickle.loads((native / ".metadata").read_bytes())
    for name in [name for name in metadata.state_dict_metadata if name.startswith(reader.SAVE)]:
        del metadata.state_dict_metadata[name]
    (native / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))
    (native / digests.FILE).unlink()


def plant(native: Path, name: str, value: object) -> None:
    """Puts `value` in the place of a saved object, and the metadata right."""
    torch.save([value], native / "planted.distcp")

    def change(metadata: Any) -> None:
        (index,) = [index for index in metadata.storage_data if index.fqn.startswith(name)]
        entry = metadata.storage_data[index]
        entry.relative_path, entry.offset, entry.length = "planted.distcp", 0, (native / "planted.distcp").stat().st_size

    rewrite_metadata(native, change)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.distributed.checkpoint.api.load"])
def test_only_listed_globals_are_built(name: str) -> None:
    module, _, function = name.rpartition(".")
    content = b"c" + module.encode() + b"\n" + function.encode() + b"\n."
    with pytest.raises(CheckpointError, match=f"asks for {name}"):
        safe_unpickling.parse_metadata(Path(".metadata"), content)


def test_fault_10_a_truncated_or_missing_file_is_named(run: Path, ranks: RankServer) -> None:
    shard = run / "checkpoints/step_4/native/__1_0.distcp"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    refused(ranks, run, rf"__1_0.distcp has {size - 1} bytes of at least {size}")
    shard.unlink()
    refused(ranks, run, r"__1_0.distcp is missing")


def test_a_file_outside_of_the_folder_is_refused(run: Path, ranks: RankServer) -> None:
    native = run / "checkpoints/step_4/native"

    def change(metadata: Any) -> None:
        for entry in metadata.storage_data.values():
            entry.relative_path = f"../{entry.relative_path}"

    rewrite_metadata(native, change)
    refused(ranks, run, r"points out of the folder")


def test_another_models_checkpoint_is_refused_with_all_names(saved: Path, ranks: RankServer) -> None:
    refused(ranks, saved, r"(?s)linear_qkv.*shape \[4, 64, 24\].*\[4, 64, 32\] in the checkpoint", function="loaded_narrower")
    refused(ranks, saved, r"output_layer.weight: in the model, not in the checkpoint", function="loaded_untied")


def test_weights_alone_are_read_and_become_the_masters(saved: Path, ranks: RankServer) -> None:
    for topology in (Topology(pp=2), Topology(dp=2)):
        assert ranks.run(f"{CASES}:weights_only", topology=topology, kwargs={"folder": str(saved)}) == [True, True]


def test_a_failing_rank_fails_the_save_on_all_and_leaves_nothing(ranks: RankServer, tmp_path: Path) -> None:
    results = ranks.run(f"{CASES}:save_without_space", topology=Topology(dp=2), kwargs={"run_dir": str(tmp_path)})
    for message, step in results:
        assert "can't be written" in message and "No space left" in message
        assert step == 2
    assert list((tmp_path / "checkpoints/step_2").iterdir()) == []


@pytest.mark.parametrize("moment", ["writing", "before the rename"])
def test_fault_01_a_killed_save_leaves_the_previous_step(run: Path, ranks: RankServer, moment: str) -> None:
    before = ranks.run(f"{CASES}:loaded", topology=Topology(tp=2), kwargs={"folder": str(run)})
    with pytest.raises(RankError) as caught:
        kwargs = {"run_dir": str(run), "moment": moment}
        ranks.run(f"{CASES}:killed_in_save", topology=Topology(tp=2), kwargs=kwargs, timeout=60)
    assert caught.value.failure["exit_code"] == -signal.SIGKILL
    assert not (run / "checkpoints/step_6/native").exists()
    after = ranks.run(f"{CASES}:loaded", topology=Topology(tp=2), kwargs={"folder": str(run)})
    for first, second in zip(before, after, strict=True):
        assert all(torch.equal(first["parameters"][name], tensor) for name, tensor in second["parameters"].items())

    kwargs = {"run_dir": str(run), "steps": 6, "resume": "auto", "save_every": 2}
    ranks.run(f"{CASES}:run", topology=Topology(tp=2), kwargs=kwargs)
    assert not list(run.rglob("*.partial"))
    assert (run / "checkpoints/step_6/native/metadata.json").exists()


def test_fault_09_the_newest_step_is_the_highest_number(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        native = tmp_path / f"step_{step}" / "native"
        native.mkdir(parents=True)
        (native / "metadata.json").touch()
        (native / ".metadata").touch()
        os.utime(native, (step != 9, step != 9))
    (tmp_path / "step_200/.native.partial").mkdir(parents=True)
    (tmp_path / "step_300/native").mkdir(parents=True)
    assert folders.latest(tmp_path) == tmp_path / "step_100/native"
    assert list(folders.committed_steps(tmp_path)) == [9, 10, 100]


def test_keep_last_and_orphans(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / f"step_{step}" / "native"
        partial = folders.begin(folder)
        (partial / "metadata.json").touch()
        (partial / ".metadata").touch()
        folders.commit(folder)
    steps.keep(tmp_path, last=2, best=0)
    assert list(folders.committed_steps(tmp_path)) == [2, 3]
    folders.begin(tmp_path / "step_4/native")
    (tmp_path / "step_1.removed/native").mkdir(parents=True)
    steps.remove_orphans(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"step_2", "step_3"}
    with pytest.raises(CheckpointError, match="exists already"):
        folders.begin(tmp_path / "step_3/native")


def test_what_bears_a_steps_name_and_is_none_is_passed_over(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for folder in (checkpoints / "step_1", tmp_path / "elsewhere", checkpoints / "step_3", checkpoints / "step_05"):
        (folder / "native").mkdir(parents=True)
        for name in ("metadata.json", ".metadata"):
            (folder / "native" / name).touch()
    (checkpoints / "step_2").symlink_to(tmp_path / "elsewhere")
    (checkpoints / "step_4").symlink_to("nowhere")
    (checkpoints / "step_5").write_text("notes")
    (checkpoints / "step_6").symlink_to("step_6")
    (checkpoints / "step_7/native").mkdir(parents=True)
    (checkpoints / "step_8.removed").symlink_to(tmp_path / "elsewhere")
    (checkpoints / f"step_{'9' * 200}").touch()
    (tmp_path / "elsewhere" / ".native.partial").symlink_to(tmp_path)

    assert steps.remove_orphans(checkpoints) == []
    assert list(folders.committed_steps(checkpoints)) == [1, 2, 3]
    assert not (checkpoints / "step_8.removed").is_symlink() and not (tmp_path / "elsewhere/.native.partial").is_symlink()
    said = steps.invalid(checkpoints)
    assert list(said)[:4] == [4, 5, 6, 7] and len(said) == 5
    assert said[4] == "step_4 is a link that can't be read as a folder (No such file or directory)"
    assert said[5] == "step_5 is an entry that can't be read as a folder (Not a directory)"
    assert "Too many levels of symbolic links" in said[6] and said[7] == "step_7/native is no complete native checkpoint"

    (line,) = steps.keep(checkpoints, last=1, best=0)
    assert line == f"step_2 is a link, which is removed; what it leads to is kept: {tmp_path / 'elsewhere'}"
    assert list(folders.committed_steps(checkpoints)) == [3] and folders.is_committed(tmp_path / "elsewhere/native")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_without_permission_are_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step_4/native").mkdir(parents=True)
    (tmp_path / "checkpoints/step_4").chmod(0)
    assert "Permission denied" in steps.invalid(tmp_path / "checkpoints")[4]
    assert steps.remove_orphans(tmp_path / "checkpoints")[0].startswith(str(tmp_path / "checkpoints/step_4"))
    (tmp_path / "checkpoints").chmod(0)
    with pytest.raises(CheckpointError, match="checkpoints can't be read: Permission denied"):
        folders.latest(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").chmod(0o700)
    (tmp_path / "checkpoints/step_4").chmod(0o700)


def test_a_step_whose_validation_cannot_be_read_is_kept(tmp_path: Path) -> None:
    texts = {1: "", 2: '{"loss": 3.0}', 3: '{"loss": NaN}', 4: "[1]", 5: '{"loss": "low"}', 6: '{"loss": 2.0}', 7: '{"loss": 4.0}'}
    for step, text in texts.items():
        native = tmp_path / f"step_{step}/native"
        native.mkdir(parents=True)
        for name in ("metadata.json", ".metadata", f"../{steps.VALIDATION}"):
            (native / name).write_text(text)
    said = steps.keep(tmp_path, last=1, best=1)
    assert list(folders.committed_steps(tmp_path)) == [1, 4, 5, 6, 7]
    assert [line.partition(" is kept: ")[0] for line in said] == ["step_1", "step_4", "step_5"]
    assert all('validation.json must be {"loss": a number}, but ' in line and line.endswith("or the step.") for line in said)


def test_fault_08_a_second_run_is_refused(tmp_path: Path) -> None:
    first = folders.lock(tmp_path)
    with pytest.raises(CheckpointError, match="in use by another run"):
        folders.lock(tmp_path)
    first.close()
    folders.lock(tmp_path).close()


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2), Topology(pp=2, vpp=2)], ids=str)
def test_scales_of_fp8_are_each_ranks_own(ranks: RankServer, tmp_path: Path, topology: Topology) -> None:
    case, chunks = "tests.support.fp8:through_a_checkpoint", ["0", "1"][: topology.vpp]
    found = ranks.run(case, topology=topology, kwargs={"folder": str(tmp_path / "stepped"), "stepped": True})
    assert found == [(True, chunks)] * topology.world_size
    found = ranks.run(case, topology=topology, kwargs={"folder": str(tmp_path / "new"), "stepped": False})
    assert found == [(True, [])] * topology.world_size


@pytest.mark.parametrize("topology", [Topology(), Topology(pp=2, vpp=2)], ids=str)
def test_scales_of_fp8_keep_no_trace_of_evaluations(ranks: RankServer, topology: Topology) -> None:
    for stepped in (True, False):
        found = ranks.run("tests.support.fp8:looked_at", topology=topology, kwargs={"stepped": stepped})
        assert found == [[True, True]] * topology.world_size
