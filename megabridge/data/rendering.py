"""Renders chat templates, which are programs by a tokenizer's author, within limits of time and memory.

The sandbox of transformers keeps a template from files and attributes, but not from looping for ever or filling the memory. So the
first conversation is rendered in a separate process with limited time and memory before any is rendered here; and here each one has
a time limit.
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
"""CPU time for one conversation."""
MEMORY: Final = 2 << 30
"""Bytes that rendering one conversation may need beyond those of this process."""
LONGEST: Final = 1 << 26
"""Maximum number of characters of a rendered conversation."""
_WAIT: Final = 20 * SECONDS
"""Seconds of wall-clock time after which the other process is killed."""
_TRIES: Final = 8
"""Conversations that are tried in the other process until one has been rendered; the template may refuse the first ones."""
_GOOD, _REFUSED, _FULL = 0, 1, 2


class TemplateError(ConfigError):
    """A template that can't be used for any conversation."""


class Refused(ConfigError):
    """A conversation that the template refuses."""


class Template:
    """The chat template of `tokenizer`, loaded from `folder`. Raises TemplateError where it has no readable one."""

    def __init__(self, tokenizer: Any, folder: Path | str) -> None:
        self._tokenizer, self._folder, self._tries = tokenizer, folder, _TRIES
        try:
            self.source = tokenizer.get_chat_template()
        except Exception as error:  # raised by transformers: there is none, or there are several without a default
            raise TemplateError(
                f"the tokenizer in {folder} must have a chat template, but: {_line(error)}; add one to the folder."
            ) from error
        if not isinstance(self.source, str):
            raise TemplateError(f"the chat template of {folder} must be text, not {type(self.source).__name__}; write one.")

    def apply(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
        """Calls `tokenizer.apply_chat_template` within limits.

        Raises Refused for a conversation that the template refuses, TemplateError for an unusable template.
        """
        try:
            if self._tries:
                self._try(messages, settings)
            with _at_most(SECONDS):
                out = self._tokenizer.apply_chat_template(list(messages), **settings)
        except TemplateSyntaxError as error:
            raise TemplateError(f"the chat template of {self._folder} can't be read: {_line(error)}; correct it.") from error
        except ConfigError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            roles = ", ".join(str(message["role"])[:40] for message in messages[:20])
            raise Refused(
                f"the chat template of {self._folder} refuses the roles {roles}: {_line(error)}; change the messages."
            ) from error
        if isinstance(out, str) and len(out) > LONGEST:
            raise Refused(f"the chat template of {self._folder} writes {len(out)} characters, more than {LONGEST}.")
        return out

    def _try(self, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
        """Renders in another process, until that has succeeded once or _TRIES times have failed."""
        plain = {name: value for name, value in settings.items() if not name.startswith("return_")} | {"tokenize": False}
        outcome = _outcome(lambda: self._tokenizer.apply_chat_template(list(messages), **plain))
        self._tries = 0 if outcome == _GOOD else self._tries - 1
        if outcome not in (_GOOD, _REFUSED):
            raise TemplateError(
                f"the chat template of {self._folder} must render a conversation within {SECONDS} seconds and {MEMORY >> 30} GiB, "
                "and does not: it loops, or writes without end; correct it, or use another."
            )


def _line(error: Exception) -> str:
    return (said(error).splitlines() or [""])[0][:500].removeprefix("TemplateError: ").rstrip(" .")


def _outcome(render: Callable[[], object]) -> int | None:
    """Runs `render` in a fork of this process. Returns _GOOD, _REFUSED (it raised), or another value if it exceeded a limit."""
    here, there = os.pipe()  # reaches its end when the child exits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads, none of which the child needs
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
    """Limits the child's resources, calls `render`, and returns the child's exit code."""
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
    """Ends the block with a TimeoutError after `seconds` of CPU time; without effect outside the main thread."""
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
