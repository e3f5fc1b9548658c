"""A process that SIGBUS ends leaves the name of the file that was truncated."""

from __future__ import annotations

import mmap
import os
import signal
import tempfile
from pathlib import Path

from megabridge.launchers.processes import children
from megabridge.launchers.processes.outcome import Done, Failure
from megabridge.storage import crash_notes
from tests.support.limits import largest_file


def test_fault_25_the_launcher_names_the_file(tmp_path: Path) -> None:
    kept, cut = tmp_path / "kept", tmp_path / "cut"
    kept.write_bytes(bytes(100_000))
    cut.write_bytes(bytes(100_000))

    def work() -> None:
        maps = []
        for file in (kept, cut):
            crash_notes.note_mapping(file, file.stat().st_size)
            with file.open("rb") as stream:
                maps.append(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ))
        os.truncate(cut, 10)
        maps[1][-1]

    child = children.fork(3, work)
    failure = children.wait([child])
    children.end([child], 1.0)
    assert isinstance(failure, Failure) and (failure.rank, failure.exit_code) == (3, -signal.SIGBUS)
    assert failure.error.endswith(f"by SIGBUS (a file that it read was truncated): {cut} had 100000 bytes and now has 10.")


def test_nothing_is_noted_without_a_page_and_a_torn_note_says_nothing() -> None:
    with tempfile.TemporaryFile() as file:
        note = crash_notes.new_note(file.fileno())
        assert os.fstat(file.fileno()).st_size == crash_notes.SIZE and crash_notes.truncated_files(note) == ""
        note[:7] = b'[["a", '
        assert crash_notes.truncated_files(note) == ""


def test_a_note_without_room_ends_nothing() -> None:
    """Its bytes are reserved: a page without a block would end whoever writes it first by SIGBUS."""

    def work() -> None:
        with tempfile.TemporaryFile() as file, largest_file(4096):
            crash_notes.set_note(crash_notes.new_note(file.fileno()))
            for number in range(200):
                crash_notes.note_mapping(Path(f"/a/file/with/a/long/name/{number}"), 1)
            assert os.fstat(file.fileno()).st_blocks * 512 < crash_notes.SIZE
        with tempfile.TemporaryFile() as file:
            crash_notes.new_note(file.fileno())
            assert os.fstat(file.fileno()).st_blocks * 512 >= crash_notes.SIZE

    child = children.fork(0, work)
    found = children.wait([child])
    children.end([child], 1.0)
    assert found == Done()
