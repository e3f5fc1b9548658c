"""Standard streams that are closed, full, or read by nobody: what is printed gets lost, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from megabridge.launchers.processes import children, standard_streams
from megabridge.launchers.processes.outcome import Done, Failure, Outcome


def run(work: Callable[[], None], folder: Path, *, stdin: bool = True, stdout: int = -1) -> tuple[Outcome, str]:
    """How `work` ends in a process with these standard streams, settled; and what it said on standard error."""

    def settled() -> None:
        error = os.open(folder / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(error, 2)
        os.close(error)
        sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as Python leaves them where they are closed
        if not stdin:
            os.close(0)
        if stdout < 0:
            os.close(1)
        else:
            os.dup2(stdout, 1)
        standard_streams.settle()
        work()

    child = children.fork(0, settled)
    found = children.wait([child])
    children.end([child], 1.0)
    return found, (folder / "stderr").read_text()


def chatter() -> None:
    for _ in range(1000):
        print("line" * 100, flush=True)


def test_closed_streams_are_there(tmp_path: Path) -> None:
    """No file that is opened later gets their numbers."""

    def work() -> None:
        with (tmp_path / "file").open("w") as file:
            assert file.fileno() > 2
            chatter()
            os.write(1, b"from a library")
            assert os.read(0, 9) == b""
        standard_streams.check()

    assert run(work, tmp_path, stdin=False) == (Done(), "")
    assert (tmp_path / "file").read_text() == ""


def test_a_reader_that_left_ends_nothing(tmp_path: Path) -> None:
    end, start = os.pipe()
    os.close(end)

    def work() -> None:
        chatter()
        os.write(1, b"from a library")
        standard_streams.check()

    found, said = run(work, tmp_path, stdout=start)
    os.close(start)
    assert found == Done() and said.count("\n") == 1
    assert said.startswith("megabridge: standard output can't be written any more (Broken pipe)")


def test_output_on_a_full_disk_is_a_failure_when_all_is_done(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)

    def work() -> None:
        chatter()
        (tmp_path / "done").touch()
        standard_streams.check()

    found, said = run(work, tmp_path, stdout=full)
    os.close(full)
    assert isinstance(found, Failure) and found.is_expected and (tmp_path / "done").exists()
    assert found.error.startswith("standard output could not be written (No space left on device); everything was done")
    assert said.count("\n") == 1 and "No space left on device" in said


def test_all_arrives_where_the_other_end_is_slow_and_in_any_letters(tmp_path: Path) -> None:
    end, start = os.pipe()
    os.set_blocking(start, False)
    with (tmp_path / "taken").open("wb") as taken:
        reader = subprocess.Popen(["cat"], stdin=end, stdout=taken)
    os.close(end)

    def work() -> None:
        chatter()
        print("\udcff\ud800")

    found, said = run(work, tmp_path, stdout=start)
    os.close(start)
    reader.wait(60)
    assert found == Done() and not said
    assert (tmp_path / "taken").read_bytes() == (b"line" * 100 + b"\n") * 1000 + rb"\udcff\ud800" + b"\n"


def test_children_can_be_waited_for_wherever_it_was_started(tmp_path: Path) -> None:
    def work() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3

    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        found, _ = run(work, tmp_path)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert found == Done()
