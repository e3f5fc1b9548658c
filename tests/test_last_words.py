"""A process that SIGBUS ends leaves the name of the file that was truncated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from megabridge import last_words
from megabridge.launchers import local
from tests.test_run import ROOT

PROGRAM = """\
import mmap, os, sys
from megabridge import last_words
last_words.keep(last_words.page(int(sys.argv[1])))
kept, cut = sys.argv[2:]
maps = []
for file in (kept, cut):
    last_words.reading(file, os.stat(file).st_size)
    maps.append(mmap.mmap(os.open(file, os.O_RDONLY), 0, prot=mmap.PROT_READ))
os.truncate(cut, 10)
maps[1][-1]
"""


def test_fault_25_the_launcher_names_the_file(tmp_path: Path) -> None:
    kept, cut = tmp_path / "kept", tmp_path / "cut"
    kept.write_bytes(bytes(100_000))
    cut.write_bytes(bytes(100_000))
    with tempfile.TemporaryFile() as note, tempfile.TemporaryFile() as outcome:
        arguments = [sys.executable, "-c", PROGRAM, str(note.fileno()), str(kept), str(cut)]
        process = subprocess.Popen(arguments, cwd=ROOT, pass_fds=[note.fileno()])
        assert process.wait(60) == -signal.SIGBUS
        failure = local.first_failure([local.Worker(3, process, outcome, note)])
    assert (failure.rank, failure.exit_code) == (3, -signal.SIGBUS)
    assert failure.error.endswith(f"by SIGBUS (a file that it read was truncated): {cut} had 100000 bytes and now has 10.")


def test_nothing_is_noted_without_a_page_and_a_torn_note_says_nothing() -> None:
    with tempfile.TemporaryFile() as file:
        note = last_words.page(file.fileno())
        assert os.fstat(file.fileno()).st_size == last_words.SIZE and last_words.truncated(note) == ""
        note[:7] = b'[["a", '
        assert last_words.truncated(note) == ""
