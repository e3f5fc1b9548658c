"""What is at an export's place before it: an earlier export, which it replaces, and what stays there. All else refuses the export.

Whether a file is an earlier export's is said by that one's manifest, and by the file's digest: one that was changed since is the
user's. A manifest may be anybody's, so it makes nothing an export's that no export writes.
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
_LOCK: Final = re.compile(rb"[0-9a-f]{0,32}")  # what `folders.claim` writes, or a part of it


@dataclass(frozen=True)
class Earlier:
    """What rank 0 found in the folder: the earlier export's manifest, if any, the state of its files, and paths that stay."""

    path: Path
    said: Manifest | None
    state: State
    kept: tuple[str, ...]

    @classmethod
    def at(cls, path: Path) -> Self:
        """Looks at names and kinds. One rank calls it, and has claimed the folder. Raises CheckpointError for what isn't ours."""
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

    def carry(self, target: Path) -> None:
        """Gives `target` what stays, under other names of the same files, or as copies. One rank calls it.

        Raises CheckpointError where something changed since the folder was looked at, OSError where `target` can't be written.
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
    """Raises CheckpointError where what lies under the hidden names of an export to `path` is none's. One rank calls it."""
    partial, lock = folders.partial_of(path), folders.lock_of(path)
    strange = [str(place) for place in (partial, folders.removed_of(path)) if os.path.lexists(place) and not _is_folder(place)]
    if os.path.lexists(lock) and not (_is_file(lock) and _LOCK.fullmatch(regular_files.read(lock))):
        strange.append(str(lock))
    for place in (partial, folders.removed_of(path)):
        with suppress(CheckpointError):  # another export may be writing there: the claim says so
            for name, state in entries(place, apart=manifest.APART) if _is_folder(place) else ():
                # A killed export may leave folders empty.
                if not (stat.S_ISDIR(state.st_mode) or manifest.is_harmless(name, state) or manifest.is_written(name)):
                    strange.append(str(place / name))
    if strange:
        raise CheckpointError(
            f"{path} needs the names {partial.name} and {lock.name} beside it while it is written, but others' files are there; "
            "export elsewhere, or move these away:\n  " + listed(strange)
        )


def check_apart(path: Path, sources: Iterable[Path]) -> None:
    """Raises CheckpointError where an export to `path` would take the place of a folder that the model was read from."""
    for source in sources:
        if source.resolve().is_relative_to(path.resolve()):
            raise CheckpointError(
                f"{path} must not be where the model was read from ({source}), which stays; export to another folder."
            )


def check_unchanged(path: Path, found: Earlier | None, *, is_shared: bool) -> None:
    """Raises the same CheckpointError on every rank where a file of the earlier export has other bytes than it wrote. Collective.

    `found` is rank 0's. The ranks share the reading where the file system `is_shared`.
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
    """Whether it is a file, and no link to one."""
    return regular_files.exists(path) and not path.is_symlink()


def _is_folder(path: Path) -> bool:
    return regular_files.is_folder(path) and not path.is_symlink()


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without such names, or a file of another user's
        shutil.copy2(source, target, follow_symlinks=False)
