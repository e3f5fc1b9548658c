"""A directory has one run at a time, which others leave as it is."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megabridge.errors import ConfigError
from megabridge.launchers import job_files, run_lock
from megabridge.launchers.processes.outcome import Done, Failure
from megabridge.storage import folders, locks
from tests.support.command import QUEUED, ROOT, command, environ

LIVE = """
import sys
from megabridge.launchers import local
local.WORKER = "tests.launchers.test_run_lock"
from megabridge.launchers import run
sys.exit(run.main())
"""
RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below: when it was changed, and what it holds."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def live(*arguments: str, cwd: Path, **more: str) -> subprocess.Popen[str]:
    """A command whose worker writes its process number to `worker` in the working directory, and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE, *arguments, "model=tiny_llama", "platform=cpu"],
        cwd=cwd,
        env=environ(**more) | {"PYTHONPATH": f"{ROOT}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (cwd / "worker").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None and (cwd / "worker").exists(), process.communicate()[1]
    return process


@pytest.mark.parametrize(
    ("first", "place"),
    [
        (("run_dir=run",), {}),
        (("run_dir=run",), RANK),
        (("-m", "hydra/launcher=local", "hydra.sweep.dir=run", "seed=1,2"), {}),
    ],
    ids=["run", "torchrun", "sweep"],
)
def test_a_second_run_changes_nothing_of_a_live_one(tmp_path: Path, first: tuple[str, ...], place: dict[str, str]) -> None:
    process = live(*first, cwd=tmp_path, **place)
    is_sweep = "-m" in first
    run = tmp_path / "run" / "0" if is_sweep else tmp_path / "run"
    (run / "metrics.jsonl").write_text("{}\n")
    before = state(tmp_path)
    shapes = [
        ((f"run_dir={run}",), {}),
        ((f"run_dir={run}",), RANK),
        (("-m", f"hydra.sweep.dir={run.parent}", f"hydra.sweep.subdir={run.name}", "hydra/launcher=local"), {}),
    ]
    for second, where in shapes if not place and not is_sweep else shapes[1 + is_sweep :][:1]:
        answer = command(*second, "model=tiny_llama", "platform=cpu", "seed=77", cwd=tmp_path, env=where)
        assert answer.returncode == 2 and "is in use by another run (process " in answer.stderr, answer.stderr
        after = state(tmp_path)
        if second[0] == "-m" and not is_sweep:  # a sweep of its own beside the run, whose point is refused
            after = {name: found for name, found in after.items() if name in before}
        assert after == before
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


def test_ranks_that_outlive_their_parent_hold_the_directory_and_stale_locks_refuse_nobody(tmp_path: Path) -> None:
    with run_lock.claimed(tmp_path) as held:
        child = os.fork()
        if child == 0:
            signal.pause()
    with pytest.raises(ConfigError, match=rf"run_dir={tmp_path} is in use by another run \(process {os.getpid()} on .*\); wait"):
        run_lock.take(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(OSError):
        os.fstat(held)
    with run_lock.claimed(tmp_path), pytest.raises(ConfigError, match=r"hydra\.sweep\.dir=.* its own hydra\.sweep\.dir"):
        run_lock.take(tmp_path, "hydra.sweep.dir")


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none(file: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(locks, "_said", set())
    with run_lock.claimed(tmp_path), run_lock.claimed(tmp_path):
        folders.lock(tmp_path).close()
    assert capfd.readouterr().err.count("is on a file system without locks (No locks available); make sure that nothing else") == 1


def test_a_queued_points_first_rank_holds_its_directory(tmp_path: Path) -> None:
    values = '{"text": "result = 1.0", "deterministic": false, "run_dir": "%s", "checkpoint": {"path": null, "resume": "none"}}'
    (tmp_path / job_files.FILE).write_text('{"platform": "cpu", "values": %s}' % (values % (tmp_path / "run")))
    ranks = {0: Failure, 1: Done}
    with run_lock.claimed(tmp_path / "run"):
        for rank, outcome in ranks.items():
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            process = subprocess.run(
                [sys.executable, "-c", QUEUED, str(tmp_path)], cwd=ROOT, env=environ(**place), capture_output=True, text=True
            )
            assert isinstance(job_files.outcomes(tmp_path, 2)[rank], outcome), process.stderr
            assert ("is in use by another run" in process.stderr) == (rank == 0)


if __name__ == "__main__":
    Path("worker.new").write_text(str(os.getpid()))
    Path("worker.new").rename("worker")
    time.sleep(120)
