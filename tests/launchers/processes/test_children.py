"""However a process ends, whoever started it hears of it, and only a report that says so counts as done."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from megabridge.errors import LONGEST, ConfigError
from megabridge.launchers.processes import children, outcome
from megabridge.launchers.processes.children import Child
from megabridge.launchers.processes.outcome import Done, Failure, Outcome, Terminated, WorkerFailure

ROOT = Path(__file__).parents[3]
READING = """\
import mmap, os
from pathlib import Path
from megabridge.storage import crash_notes
file = Path({!r})
crash_notes.note_mapping(file, file.stat().st_size)
read = mmap.mmap(os.open(file, os.O_RDONLY), 0, prot=mmap.PROT_READ)
os.truncate(file, 10)
read[-1]
"""


class Aloof(BaseException):
    """Passes every `except Exception`, as torch's CheckpointException does."""


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


class Worse(Exception):
    def __str__(self) -> str:
        sys.exit(0)


class Numb(Exception):
    def __str__(self) -> str:
        return 3  # type: ignore[return-value]


def raising(error: BaseException) -> Callable[[], float | None]:
    def work() -> NoReturn:
        raise error

    return work


def killing(number: int) -> Callable[[], float | None]:
    def work() -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    return work


def exiting(code: int) -> Callable[[], float | None]:
    return lambda: os._exit(code)


def run(*works: Callable[[], float | None]) -> Outcome:
    started: list[Child] = []
    try:
        started += [children.fork(rank, work) for rank, work in enumerate(works)]
        return children.wait(started, until=time.monotonic() + 120, settle=60.0)
    finally:
        children.end(started, 5.0)


ENDS: dict[str, tuple[Callable[[], float | None], int, str]] = {
    "expected": (raising(ConfigError("x=1 must be 2; set it.")), 1, "x=1 must be 2; set it."),
    "surrogate": (raising(ConfigError("extra\ud800.weight is unknown")), 1, r"extra\ud800.weight is unknown"),
    "a name that is no UTF-8": (
        raising(FileNotFoundError(os.fsdecode(b"data\xff.jsonl"))),
        1,
        r"FileNotFoundError: data\udcff.jsonl",
    ),
    "terminal codes": (raising(ValueError("\x1b[2J\r\u202e")), 1, r"ValueError: \x1b[2J\r\u202e"),
    "no message": (raising(KeyError()), 1, "KeyError."),
    "a BaseException": (raising(Aloof("lost")), 1, "Aloof: lost"),
    "no text": (raising(Mute()), 1, "Mute: (its message can't be shown: ValueError)"),
    "text that exits": (raising(Worse()), 1, "Worse: (its message can't be shown: SystemExit)"),
    "text that is a number": (raising(Numb()), 1, "Numb: (its message can't be shown: TypeError)"),
    "sys.exit(0)": (raising(SystemExit(0)), 1, "it was ended by sys.exit(0) before the recipe returned."),
    "sys.exit()": (raising(SystemExit()), 1, "it was ended by sys.exit() before the recipe returned."),
    "sys.exit(256)": (raising(SystemExit(256)), 1, "it was ended by sys.exit(256) before the recipe returned."),
    "sys.exit(3)": (raising(SystemExit(3)), 3, "it was ended by sys.exit(3) before the recipe returned."),
    "sys.exit of a text": (raising(SystemExit("out of luck")), 1, "out of luck"),
    "Ctrl-C": (raising(KeyboardInterrupt()), 130, "KeyboardInterrupt."),
    "SIGTERM": (raising(Terminated()), 143, "Terminated."),
    "os._exit(0)": (exiting(0), 1, "ended with exit status 0 and without a report"),
    "os._exit(7)": (exiting(7), 7, "ended with exit code 7 and without a report"),
    "SIGKILL": (killing(signal.SIGKILL), 137, "was ended by SIGKILL (out of memory, or killed from outside)."),
    "a signal without a name": (
        killing(signal.SIGRTMIN + 5),
        128 + signal.SIGRTMIN + 5,
        f"was ended by signal {signal.SIGRTMIN + 5}.",
    ),
    "in place of others": (raising(WorkerFailure(Failure(9, -11, "was ended by SIGSEGV."))), 139, "was ended by SIGSEGV."),
}


@pytest.mark.parametrize("end", ENDS)
def test_every_end_but_a_return_is_a_failure(end: str) -> None:
    work, status, error = ENDS[end]
    found = run(work)
    assert isinstance(found, Failure) and found.error.startswith(error) and found.status == status
    assert found.is_silent == (end.startswith(("os", "SIGK", "a sig")))
    assert found.text().encode() and found.text().isprintable() == (not found.traceback or found.is_expected)
    WorkerFailure(found)


@pytest.mark.parametrize("letter", ["a", "\x01", "\udcff", "\U0001f600", "\x00\n"])
def test_a_report_of_any_size_comes_through(letter: str) -> None:
    """Longer than a pipe holds; the text is cut in the middle, not its ends."""
    found = run(raising(ValueError(f"begin {letter * 3_000_000} end")))
    assert isinstance(found, Failure) and found.error.startswith("ValueError: begin ") and found.error.endswith(" end")
    assert len(found.text()) < 12 * LONGEST and "characters left out" in found.error and found.traceback


def test_what_a_process_returned_is_the_first_ones(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: 2.5, lambda: 3.5) == Done(2.5) and run(lambda: None) == Done(None)
    found = run(lambda: float("nan"), lambda: None)
    assert isinstance(found, Done) and found.objective != found.objective
    assert isinstance(run(lambda: object()), Failure), "no report can be made of that"  # type: ignore[arg-type, return-value]
    assert "not JSON serializable" in capfd.readouterr().err


def test_whoever_left_no_report_is_the_cause() -> None:
    """The others hear of the lost connection, and may report that first, or abort."""

    def lost() -> None:
        raise ConnectionError("closed by peer")

    def killed_late() -> None:
        time.sleep(0.03)
        os.kill(os.getpid(), signal.SIGKILL)

    def vanished_late() -> None:
        time.sleep(0.03)
        os._exit(0)

    for cause in (killed_late, vanished_late):
        found = run(lost, killing(signal.SIGABRT), cause)
        assert isinstance(found, Failure) and found.rank == 2 and found.is_silent
    found = run(killing(signal.SIGABRT), lost)
    assert isinstance(found, Failure) and found.error == "ConnectionError: closed by peer"


def test_half_a_report_and_foreign_bytes_are_no_report() -> None:
    """A process that is killed while it writes; one that writes where it should not."""
    text = outcome.encoded(Failure(1, 1, "x" * 100, "trace", is_expected=True)).encode()
    for length in range(len(text)):
        assert outcome.decoded(text[:length]) is None
    assert isinstance(outcome.decoded(text), Failure) and outcome.decoded(outcome.encoded(Done(1.5))) == Done(1.5)
    for junk in (
        b"\xff",
        b"[]",
        b"3",
        b"null",
        b"{}",
        b'{"done": []}',
        b'{"done": 1, "failure": 2}',
        b"[" * 100_000,
        b'{"failure": 1}',
    ):
        assert outcome.decoded(junk) is None, junk
    for name, value in (("rank", "0"), ("error", None), ("time", "now"), ("is_silent", 1), ("more", 1)):
        values = json.loads(text)["failure"] | {name: value}
        assert outcome.decoded(json.dumps({"failure": values})) is None, name

    def torn() -> None:
        for link in list(Path("/proc/self/fd").iterdir()):
            if link.is_symlink() and "memfd" in str(link.readlink()):
                os.pwrite(int(link.name), text[:50], 0)
        os.kill(os.getpid(), signal.SIGKILL)

    found = run(torn)
    assert isinstance(found, Failure) and found.exit_code == -signal.SIGKILL and found.is_silent


def test_a_program_is_judged_as_a_fork_is(tmp_path: Path) -> None:
    """What a rank on CUDA is: it finds its files by their descriptors, and leaves its report and the files that it reads there."""
    cut = tmp_path / "cut"
    cut.write_bytes(bytes(100_000))
    ends = {
        "result = 2.5": Done(2.5),
        "result = object()": "ended with exit code 1 and without a report",
        "import os; os._exit(0)": "ended with exit status 0 and without a report",
        "raise KeyError(chr(0xD800) + chr(27))": r"KeyError: '\ud800\x1b'",
        "import sys; sys.exit(0)": "it was ended by sys.exit(0)",
        "import os; os.abort()": "was ended by SIGABRT.",
        READING.format(
            str(cut)
        ): f"was ended by SIGBUS (a file that it read was truncated): {cut} had 100000 bytes and now has 10.",
    }
    environ, configs = os.environ | {"PYTHONPATH": str(ROOT)}, [children.unnamed() for _ in ends]
    started = []
    for rank, (config, text) in enumerate(zip(configs, ends, strict=True)):
        os.pwrite(config, json.dumps({"text": text}).encode(), 0)
        started.append(children.spawn("tests.support.worker_program", [], rank=rank, environ=environ, config=config))
    for child, expected in zip(started, ends.values(), strict=True):
        found = children.wait([child])
        if isinstance(expected, str):
            assert isinstance(found, Failure) and found.error.startswith(expected)
        else:
            assert found == expected
    children.end(started, 5.0)
    for config in configs:
        os.close(config)


def test_the_time_is_up_and_what_was_started_ends_too() -> None:
    """The group of a child is ended with it, although its leader has ended before."""
    end, start = os.pipe()

    def leaves_one() -> None:
        if os.fork() == 0:
            time.sleep(600)
        os.write(start, b"x")
        raise ConfigError("no")

    started = [children.fork(0, leaves_one), children.fork(1, lambda: time.sleep(600))]  # type: ignore[func-returns-value]
    assert isinstance(found := children.wait(started), Failure) and found.error == "no"
    children.end(started, 5.0)
    os.close(start)
    assert os.read(end, 9) == b"x" and os.read(end, 1) == b"", "nobody is left who could write"
    os.close(end)
    started = [children.fork(0, lambda: time.sleep(600))]  # type: ignore[func-returns-value]
    found = children.wait(started, until=time.monotonic() + 0.1)
    children.end(started, 5.0)
    assert isinstance(found, Failure) and found.error == "timed out while ranks [0] were still running." and found.status == 137


def test_a_parent_that_hears_of_no_children_goes_by_reports() -> None:
    """SIGCHLD may be ignored where it was started, and is so here: the system then forgets how a child ended."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run(lambda: 2.0) == Done(2.0)
        for work in (killing(signal.SIGKILL), exiting(0), raising(ConfigError("no"))):
            assert isinstance(run(work), Failure)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_no_room_for_a_process_is_said() -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        with contextlib.suppress(OSError):
            while True:
                os.dup(0)
        children.fork(3, lambda: None)

    found = run(work)
    assert isinstance(found, Failure) and found.is_expected
    assert re.fullmatch(r"can't be started: Too many open files; end other processes, or raise .*ulimit.*", found.error)
