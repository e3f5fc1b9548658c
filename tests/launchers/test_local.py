"""The launcher ends everything that it started, and shows the first error once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megabridge.launchers import local
from megabridge.launchers.processes.outcome import WorkerFailure
from tests.support.command import ROOT, environ
from tests.support.rank_server import RankServer

RECIPES = "tests.support.launched"


def run(ranks: RankServer, recipe: str, run_dir: Path, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    given = ["model=tiny_llama", f"recipe.target={RECIPES}:{recipe}", *arguments, f"run_dir={run_dir}"]
    return ranks.program(given, cwd=run_dir.parent, **more)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_first_error_is_shown_once_and_the_rank_named(tmp_path: Path) -> None:
    """Started as a user starts it."""
    command = [
        sys.executable,
        "-m",
        "megabridge.run",
        "model=tiny_llama",
        f"recipe.target={RECIPES}:fail_on_rank_one",
        "parallel=tp2",
    ]
    command += [f"run_dir={tmp_path / 'a run with spaces'}"]
    done = subprocess.run(command, cwd=ROOT, env=environ(), capture_output=True, text=True, timeout=180, start_new_session=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "megabridge: rank 1: the answer must be 42; use 42."
    said = [line.partition(" s] ")[2] for line in done.stdout.splitlines()]
    assert said[:2] == ["starting 2 ranks on this host's CPU", "imports done"]
    assert done.stderr.strip() in (tmp_path / "a run with spaces" / "console.log").read_text()


def test_a_killed_rank_is_the_cause_not_those_that_lost_it(ranks: RankServer, tmp_path: Path) -> None:
    done = run(ranks, "crash_on_rank_one", tmp_path / "run", "parallel=tp2")
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr.startswith("megabridge: rank 1: ") and "SIGKILL" in done.stderr and done.stderr.count("rank") == 1


@pytest.mark.parametrize(
    ("recipe", "layout", "said"),
    [
        ("vanish", "tp2", r"megabridge: rank 1: ended with exit status 0 and without a report before it was done;"),
        ("end_aloof", "tp2", r"rank 1: Aloof: extra\\ud800\.weight \\x1b\[2J\\x01.*characters left out"),
    ],
)
def test_no_end_of_a_rank_counts_as_success(ranks: RankServer, tmp_path: Path, recipe: str, layout: str, said: str) -> None:
    """A rank that ends without a word; one whose error no file takes, and that is longer than a pipe holds."""
    done = run(ranks, recipe, tmp_path / "run", f"parallel={layout}")
    assert done.returncode == 1 and re.search(said, done.stderr, re.DOTALL), done.stderr
    assert {letter for letter in done.stderr if not letter.isprintable()} <= {"\n"}


PROGRAMS = {
    "result = rank + 2.5": 2.5,
    "import os, time; rank or os._exit(0); time.sleep(60)": "rank 0: ended with exit status 0 and without a report",
    "import os, time; rank and os._exit(0); time.sleep(60)": "rank 1: ended with exit status 0 and without a report",
    "import os, time; rank and os.kill(os.getpid(), 9); time.sleep(60)": r"rank 1: was ended by SIGKILL \(out of memory",
    "import os, time; rank and os._exit(256 + 7); time.sleep(60)": "rank 1: ended with exit code 7 and without a report",
    "import sys, time; rank and sys.exit(0); time.sleep(60)": r"rank 1: it was ended by sys\.exit\(0\)",
    "import time; 1 // (1 - rank); time.sleep(60)": "rank 1: ZeroDivisionError: ",
}


@pytest.mark.parametrize("text", PROGRAMS)
def test_ranks_of_their_own_programs_are_judged_as_forked_ones_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, with a program in the worker's place that needs no torch."""
    monkeypatch.setattr(local, "WORKER", "tests.support.worker_program")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    values, expected = {"text": text, "deterministic": False}, PROGRAMS[text]
    if isinstance(expected, float):
        assert local.launch(values, world_size=2, platform="cuda") == expected
        return
    with pytest.raises(WorkerFailure, match=expected) as caught:
        local.launch(values, world_size=2, platform="cuda")
    assert 0 < caught.value.failure.status < 256


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interruptions_end_all_workers(ranks: RankServer, tmp_path: Path, number: signal.Signals, status: int) -> None:
    done = run(ranks, "wait", tmp_path / "run", "parallel=dp2", signalled=(number, "run/waits*", 2))
    began = time.monotonic()
    assert done.returncode == status and not done.stderr.strip()
    pids = [[int(pid) for pid in file.read_text().split()] for file in tmp_path.glob("run/waits*")]
    assert len(pids) == 2
    # SIGKILL leaves the launcher no time to find a rank's own child that left the session; the ranks die by themselves.
    gone = [pid for rank, child in pids for pid in ([rank] if number == signal.SIGKILL else [rank, child])]
    while any(map(is_running, gone)) and time.monotonic() < began + 10:
        time.sleep(0.05)
    assert not [pid for pid in gone if is_running(pid)]
    for _, child in pids:
        if is_running(child):
            os.kill(child, signal.SIGKILL)
