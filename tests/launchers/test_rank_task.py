"""What stays beside a rank of torchrun or srun: it says how the rank ended, and turns signals into a stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megabridge.launchers import job_files
from megabridge.launchers.processes.outcome import Done, Failure
from tests.support.command import QUEUED, ROOT, environ

BESIDE = """
import sys
from megabridge.launchers import local, rank_task
from megabridge.launchers.rank_environment import RankEnvironment
local.WORKER = "tests.support.worker_program"
values = {"text": sys.argv[1], "deterministic": False, "platform": "cpu"}
sys.exit(rank_task.supervise(values, RankEnvironment(3, 4, 1, 2, "127.0.0.1", 29500), digest="0"))
"""
# What a training loop does with the signals that it lets through (megabridge.training.stopping), then without saving at all.
TRAINS = """
import signal, sys, time
received = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: received.append(1))
print("starts", flush=True)
{starts}
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
print("trains", flush=True)
while not received:
    time.sleep(0.01)
print("stops", flush=True)
{stops}
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
time.sleep(0.5)
class Stopped(SystemExit): pass
raise Stopped(75)
"""


def start(program: str, argument: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, argument],
        cwd=ROOT,
        env=environ(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("result = 1.0", 0, ""),
        ("import os; os._exit(0)", 1, "megabridge: rank 3: ended with exit status 0 and without a report"),
        ("import os; os._exit(75)", 75, "megabridge: rank 3: ended with exit code 75 and without a report"),
        ("import os; os.abort()", 134, "megabridge: rank 3: was ended by SIGABRT."),
        ("raise ValueError(chr(0xDC80))", 1, "megabridge: Traceback"),
    ],
)
def test_how_a_rank_ended_is_said_beside_it(text: str, status: int, said: str) -> None:
    process = start(BESIDE, text)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and err.startswith(said or "\n") == bool(said), err


@pytest.mark.parametrize(("moment", "signals", "status"), [("trains", 1, 75), ("starts", 1, 143), ("stops", 2, 143)])
def test_a_signal_stops_a_rank_that_trains_and_ends_any_other(moment: str, signals: int, status: int) -> None:
    """One that starts or saves for ever would be there still."""
    forever = "while True: time.sleep(1)"
    text = TRAINS.format(starts=forever if moment == "starts" else "", stops=forever if moment == "stops" else "")
    process = start(BESIDE, text)
    assert process.stdout is not None
    for word in ("starts", "trains", "stops"):
        assert process.stdout.readline() == f"{word}\n"
        if word == moment or (word == "trains" and signals == 2):
            process.send_signal(signal.SIGTERM)
        if word == moment:
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and not err


def test_a_queued_points_rank_leaves_its_outcome(tmp_path: Path) -> None:
    """Stopped after a save is done, and is queued again; a rank that vanishes is a failure, whatever its exit status."""
    text = TRAINS.format(starts="", stops="")
    for program, status, left in (
        (text, 0, Done()),
        ("result = 2.0", 0, Done(2.0)),
        ("import os; os._exit(75)", 75, None),
        ("import os; os._exit(0)", 1, None),
    ):
        values = {
            "text": program,
            "deterministic": False,
            "run_dir": str(tmp_path / "run"),
            "checkpoint": {"path": None, "resume": "none"},
        }
        (tmp_path / job_files.FILE).write_text(json.dumps({"platform": "cpu", "values": values}))
        process = start(QUEUED, str(tmp_path))
        assert process.stdout is not None
        if program == text:
            assert process.stdout.readline() == "starts\n"
            process.send_signal(signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
        found = job_files.outcomes(tmp_path, 1)[0]
        assert process.returncode == status and (found == left if left else isinstance(found, Failure)), err
        assert (tmp_path / job_files.STOPPED).exists() == (program == text)
        (tmp_path / job_files.STOPPED).unlink(missing_ok=True)


def test_an_outcome_that_cannot_be_left_is_said(tmp_path: Path) -> None:
    values = {
        "text": "result = 1.0",
        "deterministic": False,
        "run_dir": str(tmp_path / "run"),
        "checkpoint": {"path": None, "resume": "none"},
    }
    (tmp_path / job_files.FILE).write_text(json.dumps({"platform": "cpu", "values": values}))
    (tmp_path / "rank-0.json").mkdir()
    process = start(QUEUED, str(tmp_path))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "can't take the rank's outcome: Is a directory" in err and "Traceback" not in err
