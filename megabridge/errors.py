"""The errors that megabridge raises, each one sentence: the rule, the offending value, the remedy; and any error as text."""

from __future__ import annotations

from typing import Final

STOPPED_EXIT_CODE: Final = 75
"""Exit code of a run that a signal ended after it was saved (EX_TEMPFAIL: start it again with checkpoint.resume=auto)."""
LONGEST: Final = 20_000
"""Characters of a message that are shown; the middle of a longer one is left out."""


class MegabridgeError(Exception):
    """Base of every error that megabridge raises on purpose; a launcher prints its message without a traceback."""


class ConfigError(MegabridgeError):
    """A setting, or a combination of settings, that can't work."""


class MappingError(MegabridgeError):
    """Tensors that no rule consumes, parameters that no rule feeds, or shapes that don't fit."""


class CheckpointError(MegabridgeError):
    """A file or folder that is damaged, incomplete, unreachable or not what it says it is."""


class ParityError(MegabridgeError):
    """Two copies of a model that should be equal are not."""


def listed(problems: list[str], limit: int = 20) -> str:
    """Joins problems into one message, a line each, and says how many were left out past `limit`."""
    shown = problems[:limit]
    if len(problems) > limit:
        shown.append(f"... and {len(problems) - limit} more")
    return "\n  ".join(shown)


def plain(text: str, longest: int = LONGEST) -> str:
    """`text` as any file, terminal or page takes it: what can't be printed or encoded is written as an escape.

    Names in foreign files hold whatever their authors liked: lone surrogates, terminal codes, a million characters. Of more than
    `longest` characters the middle is left out.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(letter if letter.isprintable() or letter in "\n\t" else _escaped(letter) for letter in text)
    if len(text) <= longest:
        return text
    kept = (longest - 60) // 2
    return f"{text[:kept]} ... ({len(text) - 2 * kept} characters left out) ... {text[-kept:]}"


def said(error: BaseException) -> str:
    """The message of `error`, plain; with its type where megabridge did not raise it on purpose. Raises nothing.

    Whatever an error's own __str__ does, the rank that failed still has to say so.
    """
    text = message(error)
    if isinstance(error, MegabridgeError):
        return text
    return f"{_name(error)}: {text}" if text else f"{_name(error)}."


def message(error: BaseException) -> str:
    """What `error` says, plain, without its type. Raises nothing."""
    try:
        return plain(str(error))
    except BaseException as problem:
        return f"(its message can't be shown: {_name(problem)})"


def _name(error: BaseException) -> str:
    return str(type.__getattribute__(type(error), "__name__"))


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
