"""Errors that megabridge raises, each with a sentence of rule, offending value and remedy; and safe texts of any error."""

from __future__ import annotations

from typing import Final

STOPPED_EXIT_CODE: Final = 75
"""Exit code of a run that a signal ended after a save (EX_TEMPFAIL: start it again with checkpoint.resume=auto)."""
LONGEST: Final = 20_000
"""Longest message in characters; the middle of a longer one is left out."""


class MegabridgeError(Exception):
    """Base class of all errors that megabridge raises on purpose; launchers print their messages without a traceback."""


class ConfigError(MegabridgeError):
    """A setting, or a combination of settings, that can't work."""


class MappingError(MegabridgeError):
    """Tensors or parameters without a rule, or shapes that don't match."""


class CheckpointError(MegabridgeError):
    """A file or folder that is damaged, incomplete, unreachable or of the wrong kind."""


class ParityError(MegabridgeError):
    """Two copies of a model that should be equal differ."""


def listed(problems: list[str], limit: int = 20) -> str:
    """Joins problems into one message, a line each; of more than `limit` it gives the number of those left out."""
    shown = problems[:limit]
    if len(problems) > limit:
        shown.append(f"... and {len(problems) - limit} more")
    return "\n  ".join(shown)


def plain(text: str, longest: int = LONGEST) -> str:
    """Makes `text` safe for any file, terminal or page: characters that can't be printed or encoded are escaped.

    Names in untrusted files can contain lone surrogates, terminal codes or a million characters. The middle of a text of more than
    `longest` characters is left out.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(letter if letter.isprintable() or letter in "\n\t" else _escaped(letter) for letter in text)
    if len(text) <= longest:
        return text
    kept = (longest - 60) // 2
    return f"{text[:kept]} ... ({len(text) - 2 * kept} characters left out) ... {text[-kept:]}"


def said(error: BaseException) -> str:
    """Returns the message of `error`, with its type unless megabridge raised it on purpose. Never raises.

    Even if the error's own __str__ fails, the rank must be able to report it.
    """
    text = message(error)
    if isinstance(error, MegabridgeError):
        return text
    return f"{_name(error)}: {text}" if text else f"{_name(error)}."


def message(error: BaseException) -> str:
    """Returns the message of `error` without its type, made safe by `plain`. Never raises."""
    try:
        return plain(str(error))
    except BaseException as problem:
        return f"(its message can't be shown: {_name(problem)})"


def _name(error: BaseException) -> str:
    return str(type.__getattribute__(type(error), "__name__"))


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
