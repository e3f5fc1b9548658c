"""Detects the file system of a file, because network file systems are read in other ways than local disks."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Final

REMOTE: Final = frozenset(
    "nfs nfs3 nfs4 cifs smb3 smbfs lustre gpfs beegfs ceph glusterfs pvfs2 orangefs afs 9p virtiofs wekafs daos panfs".split()
)
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


def is_remote(file: Path) -> bool:
    """Whether `file` is on a network file system, or on one in user space (FUSE)."""
    kind = kind_of(file.resolve().parent, _mounts())
    return kind in REMOTE or kind.split(".")[0] in ("fuse", "fuseblk")


def kind_of(folder: Path, mounts: dict[Path, str]) -> str:
    """Type of the file system that contains the absolute path `folder`, from the mount points `mounts`; "" if unknown."""
    return next((mounts[place] for place in (folder, *folder.parents) if place in mounts), "")


@lru_cache(maxsize=1)
def _mounts() -> dict[Path, str]:
    listing = Path("/proc/self/mountinfo")
    return parse_mounts(listing.read_text(errors="surrogateescape")) if listing.exists() else {}


def parse_mounts(text: str) -> dict[Path, str]:
    """Parses mount points and file system types from a mountinfo listing (proc(5)); the last of several at one point counts."""
    found = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        found[Path(point)] = after.split(" ")[0]
    return found
