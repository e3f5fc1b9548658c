"""Whatever stands where a file of somebody else's should be: it is refused in a sentence, and nothing waits for it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megabridge.config.schema import ModelConfig
from megabridge.conversion import manifest
from megabridge.data import sources
from megabridge.data.indexed import Indexed
from megabridge.errors import CheckpointError, ConfigError, MegabridgeError
from megabridge.evaluation import rows
from megabridge.families.core.known_sizes import known_sizes
from megabridge.hf import assets
from megabridge.hf.safetensors_format import read_header
from megabridge.hf.tensor_files import find_tensors
from megabridge.launchers import sweep
from megabridge.launchers.processes import children
from megabridge.launchers.processes.outcome import Done
from megabridge.native.reader import open_folder
from megabridge.storage import metrics_file, regular_files


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    good, link = tmp_path / "good", tmp_path / "link"
    good.write_bytes(b"content")
    link.symlink_to(good)
    assert regular_files.read(link) == b"content" and regular_files.read_text(good) == "content"
    with pytest.raises(CheckpointError, match=r"good has 7 bytes, and may have 6"):
        regular_files.read(good, largest=6)
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "terminal").symlink_to("/dev/ptmx")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with (tmp_path / "endless").open("wb") as sparse:
        sparse.truncate(1 << 40)
    reasons = {
        "pipe": "must be a regular file, not a pipe",
        "zero": "must be a regular file, not a device",
        "terminal": "must be a regular file, not a device",
        "socket": "can't be read: No such device or address",
        "circle": "can't be read: Too many levels of symbolic links",
        "missing": "can't be read: No such file or directory",
        "x\0y": "can't be read: embedded null byte",
        "y" * 300: "can't be read: File name too long",
        ".": "must be a regular file, not a folder",
        "endless": "has 1099511627776 bytes, and may have",
        "latin": "must be UTF-8, and byte 0 is not",
    }
    for name, reason in reasons.items():
        with pytest.raises(CheckpointError) as caught:
            regular_files.read_text(tmp_path / name)
        assert reason in str(caught.value) and str(caught.value).endswith("."), name


def readers(folder: Path) -> dict[str, tuple[str, Callable[[], object]]]:
    """What reads which file of a folder that may be of others."""
    said = {
        "format": manifest.FORMAT,
        "tensors": {},
        "files": {"a.json": {"size": 1, "xxh3_128": "0"}},
        "layout": {},
        "versions": {},
    }
    (folder / "named").mkdir()
    (folder / "named" / manifest.MANIFEST).write_text(json.dumps(said))
    return {
        "shape": ("config.json", lambda: known_sizes(ModelConfig(path=str(folder)))),
        "config": ("config.json", lambda: assets.read_config(folder)),
        "manifest": (manifest.MANIFEST, lambda: manifest.read(folder)),
        "file of a manifest": ("named/a.json", lambda: manifest.file_entry(folder / "named" / "a.json")),
        "weights": ("model.safetensors", lambda: find_tensors(folder)),
        "index": ("model.safetensors.index.json", lambda: find_tensors(folder)),
        "header": ("model.safetensors", lambda: read_header(folder / "model.safetensors")),
        "metadata": (".metadata", lambda: open_folder(folder)),
        "rows": ("rows.jsonl", lambda: list(sources.rows(str(folder / "rows.jsonl")))),
        "rows of a pattern": ("rows.jsonl", lambda: list(sources.rows(str(folder / "*.jsonl")))),
        "text": ("text.txt", lambda: list(sources.rows(str(folder / "text.txt")))),
        "table": ("table.parquet", lambda: list(sources.rows(str(folder / "table.parquet")))),
        "tokens": ("data.idx", lambda: Indexed(folder / "data")),
        "questions": ("questions.jsonl", lambda: rows.questions(str(folder / "questions.jsonl"))),
        "sweep": (sweep.RECORD, lambda: sweep.read(folder)),
        "metrics": (metrics_file.FILE_NAME, lambda: metrics_file.read(folder)),
    }


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "circle"])
def test_every_reader_refuses_what_is_no_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "data.bin").touch()

    def work() -> None:
        for name, (file, read) in readers(tmp_path).items():
            place = tmp_path / file
            if kind == "pipe":
                os.mkfifo(place)
            elif kind == "folder":
                place.mkdir()
            else:
                place.symlink_to("/dev/zero" if kind == "device" else place)
            try:
                read()
            except (CheckpointError, ConfigError, MegabridgeError):
                pass
            else:
                raise AssertionError(f"{name} was read")
            place.rmdir() if kind == "folder" else place.unlink()

    child = children.fork(0, work)
    found = children.wait([child], until=time.monotonic() + 120)
    children.end([child], 1.0)
    assert found == Done(), found
