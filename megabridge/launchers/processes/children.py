"""Supervises child processes, forked or started as programs: reports, exit status, causes of failure, termination. No torch.

Each leads a process group of its own, so that Ctrl-C reaches only its parent, and so that everything it started in that group can
be ended with it. It is not reaped before `end`: until then its process id and group id can't be reused.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Final, NoReturn

from megabridge.launchers.processes import outcome
from megabridge.launchers.processes.ending import die_with_parent, send
from megabridge.launchers.processes.outcome import Done, Failure, Outcome, Terminated, WorkerFailure
from megabridge.storage import crash_notes

_SETTLE: Final = 0.1  # seconds between the end of a killed rank's connections and its own


@dataclass
class Child:
    """A process that this one started."""

    rank: int
    """Its rank, or -1 for a process that stands for all ranks."""
    pid: int
    pidfd: int
    report: int
    """Descriptor of the unnamed file for its report."""
    note: mmap.mmap
    """The files that it reads, in case it is killed while reading (crash_notes)."""
    popen: subprocess.Popen[bytes] | None = None
    """The program; None for a fork."""
    _outcome: Outcome | None = field(default=None, init=False)

    def has_ended(self) -> bool:
        return _exit_code(self.pid) is not None

    def outcome(self) -> Outcome | None:
        """How it ended; None while it runs. Done only if it reported so and exited with 0."""
        if self._outcome is None and (exit_code := _exit_code(self.pid)) is not None:
            self._outcome = outcome.of_exit(self.rank, exit_code, outcome.read(self.report), self.note)
        return self._outcome

    def ended_with(self) -> Outcome:
        """How it ended. It must have ended."""
        found = self.outcome()
        assert found is not None
        return found

    def failure(self) -> Failure | None:
        """Why it failed, as soon as that is known: a rank reports before it has ended."""
        found = self.outcome() or outcome.read(self.report)
        return found if isinstance(found, Failure) else None


def spawn(
    module: str,
    arguments: Sequence[str],
    *,
    rank: int,
    environ: Mapping[str, str],
    config: int,
    blocked: Set[signal.Signals] = frozenset(),
    pass_fds: Sequence[int] = (),
) -> Child:
    """Starts `python -m module`, and passes it the descriptors of its files in --config, --outcome and --note.

    It starts with the signals in `blocked` blocked, and inherits the descriptors `pass_fds`. Raises WorkerFailure where the system
    can't start another process.
    """
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        die_with_parent(parent)

    with _room(rank):
        report, note = unnamed(), unnamed()
        try:
            shared = crash_notes.new_note(note)
            popen = subprocess.Popen(
                [sys.executable, "-m", module, f"--config={config}", f"--outcome={report}", f"--note={note}", *arguments],
                env=environ,
                stdin=subprocess.DEVNULL,
                pass_fds=(config, report, note, *pass_fds),
                process_group=0,
                preexec_fn=prepare,
            )
            return Child(rank, popen.pid, _pidfd(popen.pid), report, shared, popen)
        finally:
            os.close(note)


def fork(rank: int, work: Callable[[], float | None]) -> Child:
    """Forks a process that does `work` and reports the outcome. Raises WorkerFailure where the system can't start another."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with _room(rank):
        report, note = unnamed(), crash_notes.new_note()
        pid = os.fork()
        if pid == 0:
            _child_main(rank, work, report, note, parent)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)  # the child does so too, since either may be first
        return Child(rank, pid, _pidfd(pid), report, note)


def _child_main(rank: int, work: Callable[[], float | None], report: int, note: mmap.mmap, parent: int) -> NoReturn:
    """The main function of a forked process. It never returns into its parent's code, and runs none of its exit hooks."""
    status = 1
    try:
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        die_with_parent(parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        crash_notes.set_note(note)
        found = outcome.of(work, rank)
        outcome.write(report, found)
        status = found.status if isinstance(found, Failure) else 0
    except BaseException:  # it can't report, but may be able to print
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def ended(children: Sequence[Child], seconds: float | None) -> list[Child]:
    """Waits up to `seconds` (None: forever) until one of the running `children` ends; returns those that have, possibly none."""
    poll = select.poll()
    by_descriptor = {child.pidfd: child for child in children}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    return [by_descriptor[descriptor] for descriptor, _ in poll.poll(None if seconds is None else max(0.0, seconds) * 1000)]


def wait(children: Sequence[Child], *, until: float | None = None, settle: float = _SETTLE) -> Outcome:
    """Waits until all have succeeded, and returns the first one's report; or until one fails, and returns the cause.

    One that was stopped after a save (`Failure.is_stop`) lets the others end, too, and is then what is returned.

    `until` is the time.monotonic() of a timeout, which is a failure. `settle` is the longest time in seconds between the end of a
    killed process's connections, which others may report, and its own.
    """
    running = list(children)
    while running:
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            names = [child.rank for child in running]
            return Failure(-1, -signal.SIGKILL, f"timed out while ranks {names} were still running.", is_silent=True)
        gone = ended(running, left)
        if any(failure is not None and not failure.is_stop for failure in map(Child.failure, gone)):
            return _cause(children, settle)
        running = [child for child in running if child not in gone]
    return next((failure for child in children if (failure := child.failure()) is not None), children[0].ended_with())


def _cause(children: Sequence[Child], settle: float) -> Failure:
    """The failure that caused the others. A killed process's connections close before it ends, so another may report first."""
    until = time.monotonic() + settle
    while True:
        cause = outcome.first(failure for child in children if (failure := child.failure()) is not None)
        running = [child for child in children if not child.has_ended()]
        left = until - time.monotonic()
        if cause.is_cause or not running or left <= 0:
            return cause
        ended(running, left)


def end(children: Iterable[Child], grace: float) -> None:
    """Ends those that still run and, unless all have succeeded, everything in their process groups. Leaves no zombies.

    Sends SIGTERM, and SIGKILL after `grace` seconds, or at a second Ctrl-C or SIGTERM of this process.
    """
    children = list(children)
    if not all(isinstance(child.outcome(), Done) for child in children):
        for child in children:
            send(-child.pid, signal.SIGTERM)
        until = time.monotonic() + grace
        with contextlib.suppress(KeyboardInterrupt, Terminated):
            while (running := [child for child in children if not child.has_ended()]) and (left := until - time.monotonic()) > 0:
                ended(running, left)
        for child in children:
            send(-child.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            child.outcome()
            os.waitpid(child.pid, 0)
        if child.popen is not None:
            child.popen.wait()  # so that Popen knows too
        os.close(child.pidfd)
        os.close(child.report)
        child.note.close()


def unnamed() -> int:
    """Returns the descriptor of a new file in memory, which has no name and can't meet a full disk."""
    return os.memfd_create("megabridge")


def _pidfd(pid: int) -> int:
    """Returns a descriptor that becomes readable when the child has ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:  # it has ended and was reaped already (see _exit_code)
        return os.open(os.devnull, os.O_RDONLY)


def _exit_code(pid: int) -> int | None:
    """Exit code of a child as in subprocess; None while it runs. Does not reap it."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # this process ignores SIGCHLD, or something else in it waits for children: the report decides
        return 0
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


@contextlib.contextmanager
def _room(rank: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        who = "the process of the ranks " if rank < 0 else ""
        text = f"{who}can't be started: {error.strerror or error}; end other processes, or raise the limit (ulimit -a)."
        raise WorkerFailure(Failure(rank, 1, text, is_expected=True)) from error
