"""Signals that a launcher holds back until the loop takes them, and those that come a second time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def run(code: str) -> int:
    """The exit code of a process of its own: every thread of one that is started with held signals holds them."""
    return subprocess.run([sys.executable, "-c", code], env=os.environ | {"MEGABRIDGE_PLATFORM": "cpu"}).returncode


def test_a_held_signal_waits_for_the_loop_and_none_kills() -> None:
    code = (
        "import os, signal\n"
        "held = {signal.SIGTERM, signal.SIGUSR1}\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, held)\n"
        "from megabridge.training.stopping import StopSignal\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "with StopSignal() as stop:\n"
        "    assert stop.received\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert signal.SIGTERM in signal.sigpending() and held <= signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
    )
    assert run(code) == 0


def test_a_second_signal_that_nobody_holds_has_its_effect() -> None:
    code = (
        "import os, signal\n"
        "from megabridge.training.stopping import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.received\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"MEGABRIDGE_PLATFORM": "cpu"}).returncode == -signal.SIGTERM
    )
