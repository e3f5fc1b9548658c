"""Forked ranks: they find their groups, and the first failure ends them all within seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankError, RankServer


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pids: list[int], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(map(is_running, pids)):
        time.sleep(0.05)
    assert [pid for pid in pids if is_running(pid)] == []


def test_ranks_have_groups_and_results(ranks: RankServer) -> None:
    results = ranks.run("tests.support.ranks:total", topology=Topology(tp=2, pp=2), kwargs={"start": 10})
    assert results == [(0, 0, 46), (1, 0, 46), (0, 1, 46), (1, 1, 46)]


@pytest.mark.parametrize(
    ("how", "error", "exit_code"),
    [
        ("error", "the answer must be 42; it is 41.", 1),
        ("bug", "KeyError: 'lost'", 1),
        ("killed", "was ended by SIGKILL", -9),
        ("exit", "ended with exit code 7", 7),
    ],
)
def test_the_first_failure_ends_all(ranks: RankServer, tmp_path: Path, how: str, error: str, exit_code: int) -> None:
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks.run(
            "tests.support.ranks:fail",
            topology=Topology(tp=2, pp=2),
            kwargs={"rank": 2, "how": how, "folder": str(tmp_path)},
        )
    assert time.monotonic() - started < 10
    assert caught.value.failure["rank"] == 2
    assert error in caught.value.failure["error"]
    assert caught.value.failure["exit_code"] == exit_code
    assert caught.value.failure["is_expected"] == (how == "error")
    pids = [int(pid) for file in tmp_path.glob("*.pid") for pid in file.read_text().split()]
    assert len(pids) == 8, "four ranks, and a process of each"
    wait_until_gone(pids, 2)


def test_time_is_up(ranks: RankServer, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"timed out while ranks \[0, 1\] were still running"):
        ranks.run(
            "tests.support.ranks:fail",
            topology=Topology(tp=2),
            kwargs={"rank": 0, "how": "hang", "folder": str(tmp_path)},
            timeout=3,
        )
    wait_until_gone([int(pid) for file in tmp_path.glob("*.pid") for pid in file.read_text().split()], 2)


def test_a_long_error_comes_back(ranks: RankServer) -> None:
    """The report must fit in a pipe that nobody reads yet, whatever its characters."""
    with pytest.raises(RankError, match="ööö"):
        ranks.run("tests.support.ranks:long_error", world_size=2)


HOST = """
import os, sys, time
from megabridge.errors import ConfigError
from megabridge.launchers.processes.forked import fork_ranks

def wait(rank, listener):
    open(sys.argv[1] + f"/{rank}.pid", "w").write(str(os.getpid()))
    time.sleep(300)

if sys.argv[2] == "thread":
    import threading
    threading.Thread(target=time.sleep, args=(5,), daemon=True, name="sleeper").start()
    try:
        fork_ranks(2, wait)
    except ConfigError as error:
        sys.exit(str(error))
try:
    fork_ranks(2, wait)
except KeyboardInterrupt:
    print("interrupted")
"""


def host(folder: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOST, str(folder), how]
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "MEGABRIDGE_PLATFORM": "cuda"},  # forking needs no megatron-core: it is not imported so
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pids_of(folder: Path, count: int) -> list[int]:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        texts = [file.read_text() for file in folder.glob("*.pid")]
        if len(texts) == count and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.1)
    raise AssertionError(f"no {count} ranks after two minutes")


@pytest.mark.parametrize(("number", "prints"), [(signal.SIGINT, "interrupted\n"), (signal.SIGKILL, "")])
def test_ranks_end_with_their_host(tmp_path: Path, number: signal.Signals, prints: str) -> None:
    process = host(tmp_path, "wait")
    pids = pids_of(tmp_path, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert output == prints
    wait_until_gone(pids, 5)


def test_a_process_with_threads_is_refused(tmp_path: Path) -> None:
    _, error = host(tmp_path, "thread").communicate(timeout=120)
    assert "fork_ranks needs a process with one thread, but MainThread, sleeper run" in error
