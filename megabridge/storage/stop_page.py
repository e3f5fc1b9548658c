"""What a command and the ranks that it started tell each other about a stop, in a page of memory that they share. No torch.

A signal would have to be passed on from process to process, and would end a rank that isn't ready for it. A byte waits.
"""

from __future__ import annotations

import mmap
import os
from typing import Final, Self

SIZE: Final = mmap.PAGESIZE
_ASKED, _TRAINING, _BEGUN = 0, 1, 2


class StopPage:
    """One page: whether a stop is asked for, and whether the ranks train, so that a stop ends a step and is followed by a save."""

    def __init__(self, descriptor: int = -1) -> None:
        """In the first SIZE bytes of an open file; without one in memory of this process and its forks."""
        self.descriptor = descriptor
        if descriptor >= 0:
            os.ftruncate(descriptor, SIZE)
        self._memory = mmap.mmap(descriptor, SIZE)

    @classmethod
    def new(cls) -> Self:
        """A page for children to inherit by its `descriptor`; `close` it."""
        return cls(os.memfd_create("megabridge"))

    def close(self) -> None:
        os.close(self.descriptor)

    @property
    def is_asked(self) -> bool:
        return bool(self._memory[_ASKED])

    def ask(self) -> None:
        """Has the ranks end their step, save, and stop."""
        self._memory[_ASKED] = 1

    @property
    def is_training(self) -> bool:
        return bool(self._memory[_TRAINING])

    @is_training.setter
    def is_training(self, value: bool) -> None:
        self._memory[_TRAINING] = value
        self._memory[_BEGUN] |= value

    @property
    def has_begun(self) -> bool:
        """Whether the ranks have trained."""
        return bool(self._memory[_BEGUN])


_own: Final[list[StopPage]] = []


def share(page: StopPage) -> None:
    """Makes `page` this process's, and that of all that it forks."""
    _own[:] = [page]


def own() -> StopPage:
    """This process's page; one that nobody else sees where nobody shares any."""
    if not _own:
        share(StopPage())
    return _own[0]
