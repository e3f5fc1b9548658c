"""The CPU rank host: one process imports the stack, then forks the ranks.

Sixteen ranks that import torch, transformers and megatron-core themselves take a minute and 8 GB; forked they take
seconds and share the pages. A fork copies only the calling thread, so the host forks before torch has made threads: it
imports, and computes nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch._C._distributed_c10d import Store, TCPStore

from megabridge import last_words
from megabridge.errors import ConfigError, MegabridgeError

_PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
_GRACE: Final = 2.0  # seconds between SIGTERM and SIGKILL
_MOMENT: Final = 0.1  # seconds in which a rank that was killed is gone, after its connections
_TEXT_LIMIT: Final = 7_000  # characters of error and of traceback: a pipe holds 64 KiB, so reporting never blocks


@dataclass(frozen=True)
class FirstFailure:
    """What went wrong on the rank that failed first."""

    rank: int
    """-1 when no rank failed but the time was up."""
    exit_code: int
    """As in subprocess: negative for the signal that ended the rank."""
    error: str
    """One line: the message of an error that megabridge raised on purpose, else type and message."""
    traceback: str
    """The rank's traceback; empty when it died without raising (a signal, os._exit)."""
    is_expected: bool
    """Whether megabridge raised it on purpose (errors.MegabridgeError): then `error` says it all."""

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.error}"


@dataclass
class _Rank:
    """A forked rank, as its host sees it."""

    rank: int
    pid: int
    pidfd: int
    pipe: int
    note: mmap.mmap
    report: str = ""
    exit_code: int | None = None


@dataclass
class _Listener:
    """The socket that rank 0's store listens on: bound before the fork, so that no other process can take the port."""

    socket: socket.socket | None = None


_listener = _Listener()


def forked_store(rank: int, world_size: int) -> Store | None:
    """The store of a rank that `fork_ranks` forked, for init_process_group; None in any other process."""
    if _listener.socket is None:
        return None
    host, port = _listener.socket.getsockname()
    if rank != 0:
        return TCPStore(host, port, world_size=world_size, is_master=False)
    descriptor = os.dup(_listener.socket.fileno())
    return TCPStore(host, port, world_size=world_size, is_master=True, master_listen_fd=descriptor)


def fork_ranks(
    world_size: int, target: Callable[[int], None], *, threads_each: int = 1, timeout: float | None = None
) -> FirstFailure | None:
    """Runs `target(rank)` in `world_size` forked processes and waits for them. Returns None when all succeed.

    The ranks find RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment, and
    `groups.start` in them needs no arguments. On the first failure (or after `timeout` seconds) the other ranks are
    killed, with whatever they started, within seconds. If this process dies, its ranks die with it; on
    KeyboardInterrupt they are killed and it is raised again. Must be called before torch makes threads in this process.

    Raises ConfigError when this process runs Python threads: a fork would not copy them.
    """
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate())
        raise ConfigError(f"fork_ranks needs a process with one thread, but {names} run; fork before starting them.")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(max(128, world_size))
        sys.stdout.flush()
        sys.stderr.flush()
        group = _Group(target=target, world_size=world_size, threads_each=threads_each, listener=listener)
        try:
            group.fork()
            return group.wait(None if timeout is None else time.monotonic() + timeout)
        finally:
            group.kill()


@dataclass
class _Group:
    """The ranks of one call of fork_ranks. They share a process group of their own, led by rank 0."""

    target: Callable[[int], None]
    world_size: int
    threads_each: int
    listener: socket.socket
    ranks: list[_Rank] = field(default_factory=list)

    def fork(self) -> None:
        for rank in range(self.world_size):
            read_end, write_end = os.pipe()
            host = os.getpid()
            leader = self.ranks[0].pid if self.ranks else 0
            note = last_words.page()
            pid = os.fork()
            if pid == 0:
                os.close(read_end)
                last_words.keep(note)
                _run_rank(self, rank, write_end, leader=leader, host=host)
            os.close(write_end)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpgid(pid, leader or pid)  # the rank does so too: whoever is first
            os.set_blocking(read_end, False)
            self.ranks.append(_Rank(rank=rank, pid=pid, pidfd=os.pidfd_open(pid), pipe=read_end, note=note))

    def wait(self, deadline: float | None) -> FirstFailure | None:
        """Waits for every rank; returns at the first failure, leaving the others to `kill`."""
        with selectors.DefaultSelector() as selector:
            for rank in self.ranks:
                selector.register(rank.pidfd, selectors.EVENT_READ, rank)
            while selector.get_map():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    running = [rank.rank for rank in self.ranks if rank.exit_code is None]
                    return FirstFailure(-1, -signal.SIGKILL, f"the time was up; ranks {running} still ran.", "", False)
                if any(rank.exit_code for rank in self._ended(selector, left)):
                    return self._first_failure(selector)
        return None

    def _ended(self, selector: selectors.BaseSelector, seconds: float | None) -> list[_Rank]:
        ended: list[_Rank] = [key.data for key, _ in selector.select(seconds)]
        for rank in ended:
            selector.unregister(rank.pidfd)
            rank.exit_code = _reap(rank.pid)
        return ended

    def _causes(self) -> list[_Rank]:
        """Those that ended without a report. A rank that lost its peers may abort; one that was killed, or crashed, is a cause."""
        for rank in self.ranks:
            rank.report += _drained(rank.pipe)
        return [rank for rank in self.ranks if rank.exit_code and rank.exit_code != -signal.SIGABRT and not rank.report]

    def _first_failure(self, selector: selectors.BaseSelector) -> FirstFailure:
        """The first one: a rank reports before its connections close and others fail.

        A killed rank's connections close a little before its end can be seen, so that another's report of that may come first.
        """
        until = time.monotonic() + _MOMENT
        while not (causes := self._causes()) and selector.get_map() and (left := until - time.monotonic()) > 0:
            self._ended(selector, left)
        silent = [rank for rank in self.ranks if rank.exit_code and not rank.report]
        if causes or not any(rank.report for rank in self.ranks):
            rank = (causes or silent)[0]
            assert rank.exit_code is not None
            return FirstFailure(rank.rank, rank.exit_code, _cause_of_death(rank.exit_code, rank.note), "", False)
        reports = [(json.loads(rank.report), rank) for rank in self.ranks if rank.report]
        report, rank = min(reports, key=lambda pair: float(pair[0]["time"]))
        return FirstFailure(rank.rank, report["exit_code"], report["error"], report["traceback"], bool(report["is_expected"]))

    def kill(self) -> None:
        """Ends the ranks that still run, and every process they started in their group. Leaves no zombie."""
        if self.ranks:
            leader = self.ranks[0].pid
            _signal_group(leader, signal.SIGTERM)
            until = time.monotonic() + _GRACE
            while time.monotonic() < until and not all(self._has_ended(rank) for rank in self.ranks):
                time.sleep(0.02)
            _signal_group(leader, signal.SIGKILL)
        for rank in self.ranks:
            if rank.exit_code is None:
                rank.exit_code = _reap(rank.pid)
            os.close(rank.pidfd)
            os.close(rank.pipe)
            rank.note.close()
        self.ranks.clear()

    def _has_ended(self, rank: _Rank) -> bool:
        if rank.exit_code is None:
            pid, status = os.waitpid(rank.pid, os.WNOHANG)
            if pid:
                rank.exit_code = os.waitstatus_to_exitcode(status)
        return rank.exit_code is not None


def _run_rank(group: _Group, rank: int, pipe: int, *, leader: int, host: int) -> None:
    """A rank's whole life, in the forked process. Does not return: the host's exit hooks are not the rank's."""
    exit_code = 0
    try:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(0, leader)
        _die_with(host)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        address, port = group.listener.getsockname()
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(group.world_size),
            "LOCAL_WORLD_SIZE": str(group.world_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",  # a host's own name may resolve to an address that no one answers on
        }
        _listener.socket = group.listener
        torch.set_num_threads(group.threads_each)
        group.target(rank)
    except BaseException as failure:
        exit_code = _report(failure, pipe)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def _report(failure: BaseException, pipe: int) -> int:
    """Tells the host why this rank ends; returns the exit code."""
    if isinstance(failure, SystemExit):
        if failure.code is None or failure.code == 0:
            return 0
        exit_code = failure.code if isinstance(failure.code, int) else 1
    else:
        exit_code = 130 if isinstance(failure, KeyboardInterrupt) else 1
    is_expected = isinstance(failure, MegabridgeError)
    report = {
        "time": time.monotonic(),
        "exit_code": exit_code,
        "error": (str(failure) if is_expected else f"{type(failure).__name__}: {failure}")[:_TEXT_LIMIT],
        "traceback": "".join(traceback.format_exception(failure))[-_TEXT_LIMIT:],
        "is_expected": is_expected,
    }
    os.write(pipe, json.dumps(report, ensure_ascii=False).encode())
    return exit_code


def _drained(pipe: int) -> str:
    """What is in the pipe now."""
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(pipe, 65536):
            parts.append(part)
    return b"".join(parts).decode()


def _reap(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _signal_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _cause_of_death(exit_code: int, note: mmap.mmap) -> str:
    if exit_code < 0:
        hint = " (out of memory, or killed from outside)" if exit_code == -signal.SIGKILL else ""
        if exit_code == -signal.SIGBUS:
            hint = f" (a file that it read was truncated){last_words.truncated(note)}"
        return f"ended by signal {signal.Signals(-exit_code).name}{hint}."
    return f"ended with exit code {exit_code} and no error."


def _die_with(host: int) -> None:
    """Asks Linux to kill this process when its host ends, also when the host is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != host:  # it ended in between
            os._exit(1)
