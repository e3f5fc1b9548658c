"""Kinds of values of a JSON file, each with a description and a check. No torch.

A value is checked before anything is computed with it, so a check accepts any object, JSON or not, without an exception.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Final, Self, override

_MOST: Final = 65536
"""Maximum number of entries of a list."""
_DEEPEST: Final = 16
"""Maximum nesting of objects and lists; published files have 3 levels."""
_JSON: Final = (int, float, str, list, tuple, dict, type(None))


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__(maxlevel=3, maxtuple=8, maxlist=8, maxdict=8, maxstring=80, maxother=80)

    @override
    def repr_int(self, x: int, level: int) -> str:
        return str(x) if x.bit_length() <= 128 else f"a number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """Returns a value as text for a message: on one line, shortened if long."""
    return _Short().repr(value)


def differences(ours: object, theirs: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    """(name, our value, their value) of every part in which two values of JSON differ, by the dotted name of the part."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping) and (ours or theirs):
        for key in dict.fromkeys([*ours, *theirs]):
            yield from differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{name}[{index}]")
    elif ours != theirs:
        yield name, ours, theirs


@dataclass(frozen=True)
class Kind:
    """`says` completes the sentence "it must be ..."; `allows` checks a value. If `required`, the key must be present."""

    says: str
    allows: Callable[[Any], bool]
    required: bool = False

    def or_null(self) -> Self:
        return replace(self, says=f"{self.says}, or null", allows=lambda value: value is None or self.allows(value))

    def or_a(self, other: Kind) -> Self:
        """Returns the kind of values of either kind."""
        return replace(self, says=f"{self.says}, or {other.says}", allows=lambda value: self.allows(value) or other.allows(value))

    def needed(self) -> Self:
        return replace(self, required=True)

    def problem(self, content: Mapping[str, Any], key: str, where: str = "config.json") -> str | None:
        """Returns a sentence about what is wrong with `key` in `content`; None if nothing is."""
        value = content.get(key)
        if self.required and value is None:
            return f"{where} must have {key!r}, {self.says}; add it."
        if key not in content or self.allows(value):
            return None
        return f"{key}={shown(value)} can't be represented: it must be {self.says}."


def whole(low: int, high: int) -> Kind:
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    """Integers and floats within finite bounds."""
    return Kind(f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high)


def text(longest: int = 1024) -> Kind:
    return Kind(f"a text of at most {longest} characters", lambda value: type(value) is str and len(value) <= longest)


def one_of(*values: object) -> Kind:
    """One of a few values, where 1 and 1.0 are equal, but 1 and true are not."""
    return Kind(" or ".join(map(repr, values)), lambda value: any(same(value, each) for each in values))


def list_of(kind: Kind) -> Kind:
    """Lists of at most _MOST entries, all of one kind."""
    return Kind(
        f"a list, each entry {kind.says}",
        lambda value: type(value) in (list, tuple) and len(value) <= _MOST and all(map(kind.allows, value)),
    )


def same(one: object, other: object) -> bool:
    """Whether two values are equal in JSON."""
    if isinstance(one, bool) or isinstance(other, bool) or type(one) not in _JSON:
        return one is other
    return bool(one == other)


def is_deep(value: object) -> bool:
    """Whether objects and lists are nested more deeply than in any published file."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        outer = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, list | tuple | dict)]
        level = list(islice(chain.from_iterable(outer), _MOST))
        if not level:
            return False
    return True


LAYERS: Final = whole(1, 16384)
SIZE: Final = whole(1, 2**24)
FLAG: Final = Kind("true or false", lambda value: type(value) is bool)
OBJECT: Final = Kind("an object", lambda value: isinstance(value, Mapping) and all(type(key) is str for key in value))
ANYTHING: Final = Kind("anything", lambda value: True)
SCALAR: Final = Kind(
    "a number, true, false, a text or null",
    lambda value: value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)),
)
