"""Checkpoint folders on disk, <run>/checkpoints/step_N/native: atomic commit, locks, and recovery after a kill.

A folder is written under a temporary name beside its final one, every file and folder is fsynced, and one rename
publishes it. So a folder with its final name is complete, and one with a temporary name is left over from a killed
save. No torch here; one rank calls these functions, except `join`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import time
import uuid
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Final

from megabridge.errors import CheckpointError
from megabridge.storage import locks, regular_files

NATIVE: Final = "native"
PARTIAL_SUFFIX: Final = ".partial"
REMOVED_SUFFIX: Final = ".removed"
LOCK_SUFFIX: Final = ".lock"
# Written last by megatron-core into a distributed checkpoint; its presence is part of "committed".
MARKER: Final = "metadata.json"
STEP: Final = re.compile(r"step_(\d+)")
_NAME_BYTES: Final = 255  # the longest file name on Linux
_VISIBLE: Final = 5.0  # seconds that a shared file system may take to show a new file to another host
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def step_folder(checkpoints: Path, step: int) -> Path:
    """Returns the folder of a step: checkpoints/step_N."""
    return checkpoints / f"step_{step}"


def is_committed(folder: Path) -> bool:
    """Whether `folder` is a complete native checkpoint."""
    return regular_files.exists(folder / MARKER) and regular_files.exists(folder / ".metadata")


def committed_steps(checkpoints: Path) -> dict[int, Path]:
    """Returns the native folders of all committed steps in `checkpoints`, by step, lowest first.

    Steps are those in the folders' names; time stamps aren't used, since clocks of hosts differ.
    """
    return {step: entry / NATIVE for step, entry in numbered(checkpoints).items() if is_committed(entry / NATIVE)}


def numbered(checkpoints: Path) -> dict[int, Path]:
    """Returns all entries with a step's name, by step, lowest first. Raises CheckpointError if `checkpoints` can't be read."""
    found = ((STEP.fullmatch(entry.name), entry) for entry in entries(checkpoints))
    found_steps = [(int(match[1]), entry) for match, entry in found if match]
    return dict(sorted((step, entry) for step, entry in found_steps if entry.name == step_folder(checkpoints, step).name))


def entries(folder: Path) -> list[Path]:
    """Lists a folder; empty if there is none. Raises CheckpointError if it can't be read."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} can't be read: {error.strerror}; check its permissions, or name another.") from error


def remove(path: Path) -> None:
    """Removes a file, a folder with its contents, or a link (not its target). Raises OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def latest(checkpoints: Path) -> Path | None:
    """Returns the native folder of the highest committed step, or None."""
    return next(reversed(committed_steps(checkpoints).values()), None)


def partial_of(folder: Path) -> Path:
    """Returns the temporary name under which `folder` is written."""
    return _sibling(folder, PARTIAL_SUFFIX)


def removed_of(folder: Path) -> Path:
    """Returns the name of a replaced `folder` until it is removed, if it can't be exchanged in one step."""
    return _sibling(folder, REMOVED_SUFFIX)


def lock_of(folder: Path) -> Path:
    """Returns the file that is locked while `folder` is written."""
    return _sibling(folder, LOCK_SUFFIX)


def _sibling(folder: Path, suffix: str) -> Path:
    name = folder.name
    if len(os.fsencode(name)) + len(suffix) + 1 > _NAME_BYTES:
        name = sha256(os.fsencode(name)).hexdigest()
    return folder.with_name(f".{name}{suffix}")


def begin(folder: Path) -> Path:
    """Creates an empty temporary sibling of `folder` and returns it. Raises CheckpointError if `folder` exists."""
    if regular_files.expand(folder).exists():
        raise CheckpointError(
            f"{folder} exists already and is not overwritten; start in another run folder, or continue it with "
            "checkpoint.resume=auto."
        )
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        make_parents(folder)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{partial} can't be made: {error.strerror}; write elsewhere.") from error
    return partial


def make_parents(folder: Path) -> None:
    """Creates the folders above `folder`, each fsynced in its parent. Raises OSError."""
    missing = [parent for parent in folder.parents if not parent.is_dir()]
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
        fsync(parent.parent)


def commit(folder: Path, *, replace: bool = False) -> None:
    """Renames the temporary sibling of `folder` to its final name, after everything in it is on disk.

    With `replace`, an existing folder is exchanged with the new one in one step, and removed afterwards. If the file system can't
    do that, it is moved aside first: a kill between the two renames leaves it complete under `removed_of`, from where `recover`
    restores it. Raises CheckpointError if any of that fails; then the earlier folder has its name again.
    """
    partial = partial_of(folder)
    try:
        for parent, _, files in os.walk(partial, topdown=False):
            for name in files:
                if stat.S_ISREG(Path(parent, name).lstat().st_mode):  # an export may contain links and sockets of git
                    fsync(Path(parent, name))
            fsync(Path(parent))
        _rename(partial, folder, replace=replace and folder.exists())
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder} can't be published: {error.strerror}; what was there before is kept; free space or write elsewhere."
        ) from error
    for left in (partial, removed_of(folder)):
        shutil.rmtree(left, ignore_errors=True)


def _rename(partial: Path, folder: Path, *, replace: bool) -> None:
    """Gives `partial` its final name durably, or changes nothing and raises OSError."""
    is_exchanged = replace and _exchange(partial, folder)
    old = removed_of(folder)
    is_aside = False
    try:
        if not is_exchanged:
            if replace:
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
                is_aside = True
            partial.rename(folder)
        fsync(folder.parent)
    except OSError:
        try:
            if is_exchanged:
                _exchange(partial, folder)
            elif not partial.exists():
                folder.rename(partial)
            if is_aside:
                old.rename(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder} can't be published durably, and the earlier one can't be restored: {error.strerror}; one of the two is "
                f"there, or the earlier one at {old}; check the disk and write again."
            ) from error
        raise


def _exchange(left: Path, right: Path) -> bool:
    """Exchanges two paths in one step. Returns False if the file system or the C library can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(right))


def space(folder: Path, needed: int) -> str:
    """Text for errors: `needed` bytes, and the free space at `folder`."""
    try:
        free = f"has {shutil.disk_usage(folder.parent).free} free"
    except OSError:
        free = "can't report its free space"
    return f"it needs {needed} bytes, and {folder.parent} {free}"


def check_space(folder: Path, needed: int) -> None:
    """Raises CheckpointError if the file system of `folder` has less than `needed` bytes free."""
    if needed > shutil.disk_usage(folder.parent).free:
        raise CheckpointError(f"No space left on device for {folder}: {space(folder, needed)}; free some or write elsewhere.")


def recover(folder: Path) -> None:
    """Restores a folder after a kill between the two renames of `commit`. Must be called under the lock."""
    old = removed_of(folder)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def lock(checkpoints: Path) -> IO[str]:
    """Locks `checkpoints` for this process until the returned file is closed.

    Raises CheckpointError if another process has the lock: two runs that save to one folder would destroy each other's steps.
    """
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        file = (checkpoints / ".lock").open("a+")
    except (OSError, ValueError) as error:
        reason = regular_files.reason(error)
        raise CheckpointError(
            f"{checkpoints} must be a folder that can be made and written, but: {reason}; set another run_dir or checkpoint.path."
        ) from error
    try:
        locks.take(file.fileno(), locks.EXCLUSIVE, str(checkpoints))
    except OSError as error:
        file.close()
        is_taken = isinstance(error, BlockingIOError)
        raise CheckpointError(
            f"{checkpoints} is in use by another run; wait for it to end, or give this run its own folder."
            if is_taken
            else f"{checkpoints} must be a folder that can be locked, but: {error.strerror}; set another checkpoint.path."
        ) from error
    return file


def claim(folder: Path) -> tuple[IO[str], str]:
    """Locks the name `folder` for a save; returns (lock file, token for `join`). `release` ends it, or the end of the process.

    The lock file is beside the folder, which gets renamed. The lock becomes a shared one once it is taken, so that the other ranks
    of this save can hold it too with `join`: it ends with the last of them. Raises CheckpointError if another process saves there.
    """
    path = lock_of(regular_files.expand(folder))
    try:
        make_parents(folder)
        file = _exclusive(path, folder)
        try:
            token = uuid.uuid4().hex
            file.truncate(0)
            file.write(token)
            file.flush()
            recover(folder)
            _flock(file, locks.SHARED, folder)
        except OSError:
            release(folder, file)
            raise
    except OSError as error:
        raise CheckpointError(f"{folder} can't be written: {error.strerror} ({path}); write elsewhere.") from error
    return file, token


def _exclusive(path: Path, folder: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        _flock(file, locks.EXCLUSIVE, folder)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()  # the previous holder removed the file


def join(folder: Path, token: str) -> IO[str]:
    """Shares the lock that another rank claimed. Raises CheckpointError if this host doesn't see that rank's files."""
    path = lock_of(folder)
    end = time.monotonic() + _VISIBLE
    while True:
        try:
            file = path.open("r")
            if file.read() == token:
                _flock(file, locks.SHARED, folder)
                return file
            file.close()
        except FileNotFoundError:
            pass
        if time.monotonic() > end:
            raise CheckpointError(
                f"all ranks must see the folder that rank 0 made for {folder}, but this one doesn't; write to a shared file "
                "system, or set conversion.writer=gather."
            )
        time.sleep(0.05)


def release(folder: Path, file: IO[str]) -> None:
    """Ends a claim and removes the lock file, after all ranks have finished writing."""
    with suppress(OSError):  # a remaining lock file does no harm
        lock_of(folder).unlink()
    file.close()


def _flock(file: IO[str], kind: int, folder: Path) -> None:
    try:
        locks.take(file.fileno(), kind, str(folder))
    except BlockingIOError as error:
        file.close()
        raise CheckpointError(
            f"{folder} is being written by another process; wait for it to end, or write to another folder."
        ) from error
    except OSError:
        file.close()
        raise


def fsync(path: Path) -> None:
    """Calls fsync on a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
