"""The errors that megabridge raises. Each message is one sentence: the rule, the offending value, the remedy."""

from typing import Final

STOPPED_EXIT_CODE: Final = 75
"""Exit code of a run that a signal ended after it was saved (EX_TEMPFAIL: start it again with checkpoint.resume=auto)."""


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
