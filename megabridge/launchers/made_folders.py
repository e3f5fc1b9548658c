"""The folders that this process makes before a run begins: a command that is refused takes them back. No torch.

Hydra makes a run's directory, with all above it, before it calls anything of ours.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Final

_made: Final[list[Path]] = []
_watching: Final[list[bool]] = []


def watch() -> None:
    """Begins to note them."""
    if not _watching:
        sys.addaudithook(_note)
    _watching[:] = [True]


def keep() -> None:
    """Lets them be: there is a run now."""
    _watching[:] = [False]
    _made.clear()


def take_back() -> None:
    """Removes those that are empty."""
    for folder in reversed(_made):
        with contextlib.suppress(OSError):
            folder.rmdir()
    keep()


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.mkdir" and _watching == [True]:
        path = Path(os.fsdecode(arguments[0])).absolute()
        if not path.exists():
            _made.append(path)
