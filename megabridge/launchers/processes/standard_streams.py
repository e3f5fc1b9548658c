"""Makes stdin, stdout and stderr safe: closed descriptors are opened, and a run survives a broken pipe or a full disk. No torch."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from dataclasses import dataclass
from typing import IO, Final, override

from megabridge.errors import MegabridgeError


@dataclass
class _State:
    is_quiet: bool = False
    lost: OSError | None = None
    """Why standard output can't be written, other than a reader that has closed it."""


_state: Final = _State()


def settle(*, quiet: bool = False) -> None:
    """Makes this process's standard streams safe to use. Programs call it before anything else.

    A closed descriptor becomes /dev/null: otherwise the next file that is opened would get its number and receive the output.
    Output that can't be written is dropped, and standard error says so once (with `quiet` not for a reader that has closed it).
    Text that can't be encoded is escaped. SIGCHLD is reset to its default, because this process waits for children.
    """
    _state.is_quiet = quiet
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number
    sys.stdout = _text(sys.stdout, 1)
    sys.stderr = _text(sys.stderr, 2)
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def check() -> None:
    """Raises MegabridgeError if standard output could not be written for another reason than a reader that has closed it."""
    sys.stdout.flush()
    if _state.lost is not None:
        raise MegabridgeError(
            f"standard output could not be written ({_state.lost.strerror}); everything was done, but the output is incomplete; "
            "free space for it, or redirect it to /dev/null."
        )


class _ResilientStream(io.FileIO):
    """A standard stream whose writes always succeed: after an error it is redirected to /dev/null."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)

    @override
    def write(self, data: object, /) -> int:
        rest = memoryview(data).cast("B")  # type: ignore[arg-type]
        size = len(rest)
        while len(rest):
            try:
                written = super().write(rest)
            except OSError as error:
                _redirect_to_null(self.fileno(), error)
                break
            if written is None:  # the other end is slow, and the descriptor is non-blocking
                poll = select.poll()
                poll.register(self.fileno(), select.POLLOUT)
                poll.poll()
            rest = rest[written or 0 :]
        return size


def _text(stream: IO[str] | None, descriptor: int) -> io.TextIOWrapper:
    """Returns the replacement of `stream`, which is None where its descriptor was closed."""
    raw = _ResilientStream(descriptor)
    if not isinstance(stream, io.TextIOWrapper):
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=descriptor == 2)
    stream.flush()
    buffered = raw if isinstance(stream.buffer, io.FileIO) else io.BufferedWriter(raw)
    options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(buffered, stream.encoding, "backslashreplace", **options)  # type: ignore[arg-type]


def _redirect_to_null(descriptor: int, error: OSError) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
    if descriptor != 1:
        return
    is_left = error.errno == errno.EPIPE
    if not is_left:
        _state.lost = error
    if not (is_left and _state.is_quiet):
        text = f"megabridge: standard output can't be written any more ({error.strerror}); further output is dropped, nothing else."
        print(text, file=sys.stderr, flush=True)
