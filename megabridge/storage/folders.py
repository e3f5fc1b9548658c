"""Checkpoint folders on disk: <run>/checkpoints/step_N/native, and when one counts as committed.

A folder is written under a temporary name beside its final one, every file and folder is fsynced, and one rename
publishes it. So a folder that bears its final name is complete, and whatever bears a temporary name is left over from a
killed save. No torch here; where there are many ranks, one of them calls these, but for `join`.
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
    """Where everything of one step lives: checkpoints/step_N."""
    return checkpoints / f"step_{step}"


def is_committed(folder: Path) -> bool:
    """Whether `folder` is a complete native checkpoint."""
    return regular_files.exists(folder / MARKER) and regular_files.exists(folder / ".metadata")


def committed_steps(checkpoints: Path) -> dict[int, Path]:
    """The native folders of all committed steps below `checkpoints`, by step, lowest first.

    The step in the folder's name decides, never a time stamp: clocks of two hosts differ.
    """
    return {step: entry / NATIVE for step, entry in numbered(checkpoints).items() if is_committed(entry / NATIVE)}


def numbered(checkpoints: Path) -> dict[int, Path]:
    """Everything that bears a step's name, by step, lowest first. Raises CheckpointError where `checkpoints` can't be read."""
    found = ((STEP.fullmatch(entry.name), entry) for entry in entries(checkpoints))
    found_steps = [(int(match[1]), entry) for match, entry in found if match]
    return dict(sorted((step, entry) for step, entry in found_steps if entry.name == step_folder(checkpoints, step).name))


def entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing where there is none."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} can't be read: {error.strerror}; see to its permissions, or name another.") from error


def remove(path: Path) -> None:
    """Removes a file, or a folder with all in it; of a link the link alone. Raises OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def latest(checkpoints: Path) -> Path | None:
    """The native folder of the highest committed step, or None."""
    return next(reversed(committed_steps(checkpoints).values()), None)


def partial_of(folder: Path) -> Path:
    """The temporary name under which `folder` is written."""
    return _beside(folder, PARTIAL_SUFFIX)


def removed_of(folder: Path) -> Path:
    """The name under which a replaced `folder` waits for its removal, where it can't be exchanged in one step."""
    return _beside(folder, REMOVED_SUFFIX)


def lock_of(folder: Path) -> Path:
    """The file that is locked while `folder` is written."""
    return _beside(folder, LOCK_SUFFIX)


def _beside(folder: Path, suffix: str) -> Path:
    name = folder.name
    if len(os.fsencode(name)) + len(suffix) + 1 > _NAME_BYTES:
        name = sha256(os.fsencode(name)).hexdigest()
    return folder.with_name(f".{name}{suffix}")


def begin(folder: Path) -> Path:
    """Makes an empty temporary sibling of `folder` and returns it. Raises CheckpointError where `folder` exists."""
    if regular_files.place(folder).exists():
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
    """Makes the folders above `folder`, each of them durable in its own parent. Raises OSError."""
    missing = [parent for parent in folder.parents if not parent.is_dir()]
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
        fsync(parent.parent)


def commit(folder: Path, *, replace: bool = False) -> None:
    """Publishes the temporary sibling of `folder` under its final name, after everything in it is on disk.

    With `replace`, a folder of that name changes places with the new one in one step, and is removed last. Where the file system
    can't do that, it is moved aside first: a kill between the two renames leaves it whole under `removed_of`, from where `recover`
    brings it back. Raises CheckpointError where any of that fails; then what bore the name before bears it again.
    """
    partial = partial_of(folder)
    try:
        for parent, _, files in os.walk(partial, topdown=False):
            for name in files:
                if stat.S_ISREG(Path(parent, name).lstat().st_mode):  # an export may take over git's links and sockets
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
    """Gives `partial` its final name, durably, or changes nothing and raises OSError."""
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
                f"{folder} can't be published durably, nor can what was there be brought back: {error.strerror}; one of the two is "
                f"there, or the old one at {old}; look after the disk and write again."
            ) from error
        raise


def _exchange(left: Path, right: Path) -> bool:
    """Lets two paths change places in one step. False where the file system or the C library can't."""
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
    """What an error says of room for `needed` bytes in the place of `folder`."""
    try:
        free = f"has {shutil.disk_usage(folder.parent).free} free"
    except OSError:
        free = "can't be asked for its free space"
    return f"it needs {needed} bytes, and {folder.parent} {free}"


def check_space(folder: Path, needed: int) -> None:
    """Raises CheckpointError where `needed` bytes don't fit beside `folder`."""
    if needed > shutil.disk_usage(folder.parent).free:
        raise CheckpointError(f"No space left on device for {folder}: {space(folder, needed)}; free some or write elsewhere.")


def recover(folder: Path) -> None:
    """Brings back what a kill between the two renames of `commit` left under another name. Call it under the lock."""
    old = removed_of(folder)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def lock(checkpoints: Path) -> IO[str]:
    """Claims `checkpoints` for this process until the returned file is closed.

    Raises CheckpointError where another process has it: two runs that save into one folder destroy each other's steps.
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
    """Claims the name `folder` for a save: (lock file, token for `join`). `release` it, or let the process end.

    The lock lies beside the folder, which is renamed. It is shared as soon as it is won, so that `join` lets the other ranks of
    this save hold it too: it is free when all of them are gone. Raises CheckpointError where another process saves there.
    """
    path = lock_of(regular_files.place(folder))
    try:
        make_parents(folder)
        file = _won(path, folder)
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


def _won(path: Path, folder: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        _flock(file, locks.EXCLUSIVE, folder)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()  # the one before removed it when it was done


def join(folder: Path, token: str) -> IO[str]:
    """Holds the lock that another rank claimed. Raises CheckpointError where this host doesn't see that rank's files."""
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
    """Gives a claimed name back and removes the lock, once no rank writes any more."""
    with suppress(OSError):  # a lock file that stays is no harm
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
    """Makes a file or a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
