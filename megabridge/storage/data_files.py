"""Which local files a setting of data names. No torch: the command asks before it starts ranks."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Final

from megabridge.errors import ConfigError
from megabridge.storage import regular_files

SUFFIXES: Final = (".jsonl", ".ndjson", ".parquet", ".txt")


def local_files(path: str) -> list[Path] | None:
    """The files that `path` names, sorted: a file, a folder with such files, or a pattern. None: it is no local file.

    A folder without them is none: `datasets` may know it. Raises ConfigError for a file of another kind, and
    CheckpointError for what is no regular file.
    """
    place = regular_files.expand(path)
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES and regular_files.exists(file))
        return found or None
    # Path.glob takes no absolute pattern.
    found = [place] if place.is_file() else sorted(Path(name) for name in glob.glob(str(place), recursive=True))  # noqa: PTH207
    for file in found:
        regular_files.opened(file).close()
    others = [str(file) for file in found if file.suffix not in SUFFIXES]
    if others:
        raise ConfigError(f"{others[0]} must be {', '.join(SUFFIXES)}; convert it.")
    if not found and (place.suffix in SUFFIXES or place.is_absolute() or "*" in path):
        raise ConfigError(f"{path} names no file; check the path.")
    return found or None


def indexed_files(prefix: str | Path) -> tuple[Path, Path]:
    """(.bin, .idx) of a prefix of megatron-core's indexed data; one of the two files is taken for it, too."""
    name = str(regular_files.expand(prefix))
    for suffix in (".bin", ".idx"):
        name = name.removesuffix(suffix)
    return Path(f"{name}.bin"), Path(f"{name}.idx")


def check_indexed(prefix: str | Path) -> tuple[Path, Path]:
    """`indexed_files` that exist. Raises ConfigError."""
    found = indexed_files(prefix)
    for file in found:
        if not regular_files.exists(file):
            raise ConfigError(f"data.paths: {file} does not exist; make it with recipe=prepare_data, or mend the path.")
    return found
