"""Keeps keys, tokens and passwords out of every file that a run or Hydra writes.

A value counts as secret when its key sounds like one, or when it comes from the environment. A value that the config takes from the
environment is written as its interpolation, `${oc.env:NAME}`, so that the written config can be run again.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

REDACTED: Final = "<redacted>"
CARRIED: Final = "MEGABRIDGE_SECRET_"
"""Prefix of the environment variables that carry secrets given on the command line past Hydra's files."""

_NAMES: Final = re.compile(
    r"(^|_)((api|access|secret|private|auth|hmac|signing)_?key(_id)?|key|token|secrets?|password|passwd|passphrase|"
    r"credentials?|auth)$",
    re.IGNORECASE,
)
_NOT_SECRET: Final = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask|image|video|audio|additional)_token$")
_FROM_ENV: Final = re.compile(r"\$\{\s*oc\.env\s*:\s*([^},\s]+)")
_SHORTEST: Final = 6
"""Minimum length of values of the environment that are searched for inside other values: `1` would be everywhere."""


def is_secret(key: str) -> bool:
    """Whether a value under `key` must not be written."""
    return bool(_NAMES.search(key)) and not _NOT_SECRET.match(key)


def carry(arguments: list[str], environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Returns the command line with secret values moved into `environ`: Hydra writes overrides into the files of a sweep."""
    carried = []
    for text in arguments:
        key, equals, value = text.partition("=")
        last = key.lstrip("+~").rpartition(".")[2]
        if equals and value and not text.startswith("-") and "${" not in value and is_secret(last):
            name = CARRIED + re.sub(r"\W", "_", key.lstrip("+~")).upper()
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            environ[name] = value[1:-1] if quoted else value
            text = f"{key}=${{oc.env:{name}}}"
        carried.append(text)
    return carried


def redacted(raw: Any, resolved: Any, environ: MutableMapping[str, str] = os.environ) -> Any:
    """Returns a copy of `resolved` without secrets. `raw` is the same config with its interpolations."""
    names = set(_FROM_ENV.findall(_text(raw)))
    values = sorted({environ.get(name, "") for name in names}, key=len, reverse=True)
    return _redacted(raw, resolved, [value for value in values if len(value) >= _SHORTEST], secret=False)


def written(run_dir: Path) -> dict[str, Any]:
    """Reads the config in a run's directory, with its interpolations; empty where it is missing or unreadable."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"), resolve=False)
    except Exception:  # another program's file, or a damaged one
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _text(node: Any) -> str:
    if isinstance(node, dict):
        return "\n".join(_text(value) for value in node.values())
    if isinstance(node, list):
        return "\n".join(map(_text, node))
    return node if isinstance(node, str) else ""


def _redacted(raw: Any, resolved: Any, values: list[str], *, secret: bool) -> Any:
    if isinstance(resolved, dict):
        inner = raw if isinstance(raw, dict) else {}
        return {
            key: _redacted(inner.get(key), value, values, secret=secret or is_secret(str(key))) for key, value in resolved.items()
        }
    if isinstance(resolved, list):
        parts = raw if isinstance(raw, list) and len(raw) == len(resolved) else [None] * len(resolved)
        return [_redacted(part, value, values, secret=secret) for part, value in zip(parts, resolved, strict=True)]
    from_env = _FROM_ENV.findall(raw) if isinstance(raw, str) else []
    if from_env and not any(name.startswith(CARRIED) for name in from_env) and "," not in raw:
        return raw
    if not isinstance(resolved, str):
        return resolved
    if secret or from_env:
        return REDACTED
    for value in values:
        resolved = resolved.replace(value, REDACTED)
    return resolved
