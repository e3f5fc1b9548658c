"""The launcher ends everything that it started, and shows the first error once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megabridge.launchers import local, report
from megabridge.launchers.report import Failure, WorkerFailure
from tests.test_run import ROOT, environ

RECIPES = "tests.launchers.recipes"


def start(recipe: str, run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "megabridge.run",
            "model=tiny_llama",
            f"recipe.target={RECIPES}:{recipe}",
            *arguments,
            f"run_dir={run_dir}",
        ],
        cwd=ROOT,
        env=environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_first_error_is_shown_once_and_the_rank_named(tmp_path: Path) -> None:
    run = start("fail_on_rank_one", tmp_path / "a run with spaces", "parallel=tp2")
    out, err = run.communicate(timeout=180)
    assert run.returncode == 1
    assert err.strip() == "megabridge: rank 1: the answer must be 42; use 42." and not out.strip()


def test_a_killed_rank_is_the_cause_not_those_that_lost_it(tmp_path: Path) -> None:
    run = start("crash_on_rank_one", tmp_path, "parallel=tp2")
    _, err = run.communicate(timeout=180)
    assert run.returncode == 128 + signal.SIGKILL
    assert err.startswith("megabridge: rank 1: ") and "SIGKILL" in err and err.count("rank") == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interruptions_end_all_workers(tmp_path: Path, number: signal.Signals, status: int) -> None:
    run = start("wait", tmp_path, "parallel=dp2")
    until = time.monotonic() + 180
    while len(list(tmp_path.glob("waits*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    pids = [[int(pid) for pid in file.read_text().split()] for file in tmp_path.glob("waits*")]
    assert len(pids) == 2
    os.kill(run.pid, number)
    began = time.monotonic()
    _, err = run.communicate(timeout=10)
    assert run.returncode == status and not err.strip()
    # SIGKILL leaves the launcher no time to find a rank's own child that left the session; the ranks die by themselves.
    gone = [pid for rank, child in pids for pid in ([rank] if number == signal.SIGKILL else [rank, child])]
    while any(map(is_running, gone)) and time.monotonic() < began + 10:
        time.sleep(0.05)
    assert not [pid for pid in gone if is_running(pid)]
    for _, child in pids:
        if is_running(child):
            os.kill(child, signal.SIGKILL)


def failed(rank: int, exit_code: int, failure: Failure | None, folder: Path) -> local.Worker:
    process = subprocess.Popen([sys.executable, "-c", f"import os; os._exit({exit_code})"])
    process.wait()
    outcome = (folder / f"outcome{rank}").open("w+b")
    if failure is not None:
        report.write(outcome.fileno(), failure)
    return local.Worker(rank, process, outcome, (folder / f"note{rank}").open("w+b"))


def test_of_several_failures_the_earliest_or_the_silent_one_counts(tmp_path: Path) -> None:
    late = failed(0, 1, Failure(0, 1, "connection lost", "Traceback", time=9.0), tmp_path)
    early = failed(1, 1, Failure(1, 1, "the cause", "Traceback", time=5.0), tmp_path)
    silent = failed(2, 7, None, tmp_path)
    assert local.first_failure([late, early]).error == "the cause"
    assert local.first_failure([late, early, silent]).rank == 2
    with pytest.raises(WorkerFailure, match="rank 2: ended with exit code 7"):
        raise WorkerFailure(local.first_failure([late, silent]))


def test_outcomes_travel_unchanged(tmp_path: Path) -> None:
    with (tmp_path / "outcome").open("w+b") as file:
        assert report.read(file.fileno()) is None
        for outcome in (2.5, None, Failure(3, -9, "ä", "trace", True)):
            file.truncate(0)
            report.write(file.fileno(), outcome)
            assert report.read(file.fileno()) == outcome
    assert Failure(3, -9, "x").status == 137 and Failure(3, 4, "x").status == 4
