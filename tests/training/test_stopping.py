"""Signals that a launcher holds back until the loop takes them, and those that come a second time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from megabridge.training.stopping import StopSignal


def test_a_held_signal_waits_for_the_loop_and_none_kills() -> None:
    held = set(StopSignal.SIGNALS)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopSignal() as stop:
            assert stop.received
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.SIGTERM in signal.sigpending() and held <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert signal.sigwait({signal.SIGTERM}) == signal.SIGTERM
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
