"""Decides what may be at an export's path: an earlier export, which is replaced, and harmless files, which stay. Refuses all else.

A file belongs to an earlier export if that export's manifest lists it and its digest is unchanged: a file that was changed since is
the user's. Anybody can write a manifest, so only names that an export can write count.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from megabridge.conversion import manifest, verify
from megabridge.conversion.manifest import MANIFEST, Manifest
from megabridge.errors import CheckpointError, listed
from megabridge.parallel import collectives
from megabridge.storage import folders, regular_files
from megabridge.storage.inside_folder import entries

State = Mapping[str, tuple[int, int, int]]  # by path: inode, size in bytes, time of change in ns
_LOCK: Final = re.compile(rb"[0-9a-f]{0,32}")  # content that `folders.claim` writes, or a part of it


@dataclass(frozen=True)
class Earlier:
    """The content of the folder as rank 0 found it: an earlier export's manifest, if any, its files' state, and paths to keep."""

    path: Path
    said: Manifest | None
    state: State
    kept: tuple[str, ...]

    @classmethod
    def at(cls, path: Path) -> Self:
        """Reads names and kinds of files in `path`. One rank calls it, after claiming the folder.

        Raises CheckpointError for files that are neither harmless nor an earlier export's.
        """
        try:
            if not path.exists():
                return cls(path, None, {}, ())
            if not path.is_dir():
                raise CheckpointError(f"{path} is a file, where the export's folder is to be; export elsewhere or remove it.")
            said = _manifest(path) if _is_file(path / MANIFEST) else None
            ours = {name for name in (*said.paths(), MANIFEST) if _is_file(path / name)} if said else set()
            ours = {name for name in ours if manifest.is_written(name)}
            problems, kept = manifest.unlisted(path, ours)
            _refuse(path, problems)
            state = {name: (found.st_ino, found.st_size, found.st_mtime_ns) for name in ours for found in [(path / name).lstat()]}
        except OSError as error:
            raise CheckpointError(f"{path} can't be written: {error.strerror}; export elsewhere.") from error
        return cls(path, said.only(ours) if said else None, state, tuple(kept))

    def copy_kept(self, target: Path) -> None:
        """Links or copies the kept files into `target`. One rank calls it.

        Raises CheckpointError where a file changed since the folder was read, OSError where `target` can't be written.
        """
        now = Earlier.at(self.path)
        changed = sorted(name for name in now.state.keys() | self.state.keys() if now.state.get(name) != self.state.get(name))
        _refuse(self.path, [f"{name}: the file changed while the export was written" for name in changed])
        for name in now.kept:
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if (self.path / name).is_dir():
                shutil.copytree(self.path / name, place, symlinks=True, copy_function=_link)
            else:
                _link(self.path / name, place)


def check_hidden(path: Path) -> None:
    """Raises CheckpointError where foreign files have the hidden names that an export to `path` uses. One rank calls it."""
    partial, lock = folders.partial_of(path), folders.lock_of(path)
    strange = [str(place) for place in (partial, folders.removed_of(path)) if os.path.lexists(place) and not _is_folder(place)]
    if os.path.lexists(lock) and not (_is_file(lock) and _LOCK.fullmatch(regular_files.read(lock))):
        strange.append(str(lock))
    for place in (partial, folders.removed_of(path)):
        with suppress(CheckpointError):  # another export may be writing there: claiming the folder reports it
            for name, state in entries(place, apart=manifest.APART) if _is_folder(place) else ():
                # A killed export may leave folders empty.
                if not (stat.S_ISDIR(state.st_mode) or manifest.is_harmless(name, state) or manifest.is_written(name)):
                    strange.append(str(place / name))
    if strange:
        raise CheckpointError(
            f"writing {path} needs the names {partial.name} and {lock.name} beside it, but other files have them; "
            "export elsewhere, or move these away:\n  " + listed(strange)
        )


def check_apart(path: Path, sources: Iterable[Path]) -> None:
    """Raises CheckpointError where an export to `path` would replace a folder that the model was read from."""
    for source in sources:
        if source.resolve().is_relative_to(path.resolve()):
            raise CheckpointError(
                f"{path} must not be where the model was read from ({source}), which is never replaced; export to another folder."
            )


def check_unchanged(path: Path, found: Earlier | None, *, is_shared: bool) -> None:
    """Raises the same CheckpointError on every rank where a file of the earlier export has changed since. Collective.

    Rank 0's `found` counts. The ranks divide the reading between them where the file system `is_shared`.
    """
    said = collectives.on_rank_zero("reading the manifest of an earlier export", lambda: None if found is None else found.said)
    if said is not None:
        problems = verify.differences(path, said, ranks=None if is_shared else [0])
        collectives.on_rank_zero("looking at an earlier export", lambda: _refuse(path, problems))


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(
            f"{path} must hold nothing but an earlier export, as it was written, to be replaced by this one; export to another "
            "folder, or delete or move these:\n  " + listed(problems)
        )


def _manifest(path: Path) -> Manifest:
    try:
        return manifest.read(path)
    except CheckpointError as error:
        _refuse(path, [str(error)])
        raise


def _is_file(path: Path) -> bool:
    """Whether it is a regular file and not a symbolic link."""
    return regular_files.exists(path) and not path.is_symlink()


def _is_folder(path: Path) -> bool:
    return regular_files.is_folder(path) and not path.is_symlink()


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links, or another user's file
        shutil.copy2(source, target, follow_symlinks=False)
