"""Chat templates are programs of whoever made a tokenizer. What one may take of a host is bounded.

The sandbox of transformers keeps a template from files and attributes, but not from looping for ever or filling the memory. So the
first conversation is rendered once in a process of its own, whose time and memory have a limit, before any is rendered here; and
here each has a limit of time.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from jinja2 import TemplateSyntaxError

from megabridge.errors import ConfigError, said

SECONDS: Final = 5
"""Of a core's time, for one conversation."""
MEMORY: Final = 2 << 30
"""Bytes that rendering one conversation may need besides what this process has."""
LONGEST: Final = 1 << 26
"""Characters of a rendered conversation."""
_WAIT: Final = 20 * SECONDS
"""Seconds within which the other process must have had its time of a core."""
_TRIES: Final = 8
"""Conversations of which one must have been rendered in the other process; the template may refuse the first ones."""
_GOOD, _REFUSED, _FULL = 0, 1, 2


class TemplateError(ConfigError):
    """A template that can't be used, whatever the conversation."""


class Refused(ConfigError):
    """A conversation that the template doesn't take."""


class Template:
    """The chat template of `tokenizer`, which is from `folder`. Raises TemplateError where it has none that can be read."""

    def __init__(self, tokenizer: Any, folder: Path | str) -> None:
        self._tokenizer, self._folder, self._tries = tokenizer, folder, _TRIES
        try:
            self.source = tokenizer.get_chat_template()
        except Exception as error:  # transformers': none, or several of which none is the default
            raise TemplateError(
                f"the tokenizer in {folder} must have a chat template, but: {_line(error)}; put one beside it."
            ) from error
        if not isinstance(self.source, str):
            raise TemplateError(f"the chat template of {folder} must be text, not {type(self.source).__name__}; write one.")

    def apply(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
        """`tokenizer.apply_chat_template` within bounds. Raises Refused for this conversation, TemplateError for any."""
        try:
            if self._tries:
                self._try(messages, settings)
            with _at_most(SECONDS):
                out = self._tokenizer.apply_chat_template(list(messages), **settings)
        except TemplateSyntaxError as error:
            raise TemplateError(f"the chat template of {self._folder} can't be read: {_line(error)}; mend it.") from error
        except ConfigError:
            raise
        except Exception as error:  # a template is a program, and may raise whatever it likes
            roles = ", ".join(str(message["role"])[:40] for message in messages[:20])
            raise Refused(
                f"the chat template of {self._folder} refuses the roles {roles}: {_line(error)}; change the messages."
            ) from error
        if isinstance(out, str) and len(out) > LONGEST:
            raise Refused(f"the chat template of {self._folder} writes {len(out)} characters; {LONGEST} may be.")
        return out

    def _try(self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
        """Has another process render, until it was done once."""
        plain = {name: value for name, value in settings.items() if not name.startswith("return_")} | {"tokenize": False}
        outcome = _outcome(lambda: self._tokenizer.apply_chat_template(list(messages), **plain))
        self._tries = 0 if outcome == _GOOD else self._tries - 1
        if outcome not in (_GOOD, _REFUSED):
            raise TemplateError(
                f"the chat template of {self._folder} must render a conversation within {SECONDS} seconds and {MEMORY >> 30} GiB, "
                "and does not: it loops, or writes without end; mend it, or put another in its place."
            )


def _line(error: Exception) -> str:
    return (said(error).splitlines() or [""])[0][:500].removeprefix("TemplateError: ").rstrip(" .")


def _outcome(render: Callable[[], object]) -> int | None:
    """How `render` ends in a fork of this process: _GOOD, _REFUSED (it raised), or otherwise where it took more than it may."""
    here, there = os.pipe()  # which is at its end when the child is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which the child needs
        child = os.fork()
    if child == 0:
        os._exit(_rendered(render))
    os.close(there)
    with os.fdopen(here, "rb"):
        if not select.select([here], [], [], _WAIT)[0]:
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def _rendered(render: Callable[[], object]) -> int:
    """The exit code of the child. Nothing of it is left, whatever happens."""
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, size + MEMORY)):
            hard = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        render()
    except MemoryError:
        return _FULL
    except BaseException:
        return _REFUSED
    return _GOOD


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Ends a block of Python by TimeoutError after so much of a core's time; only where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _end(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"it took more than {SECONDS} seconds")
