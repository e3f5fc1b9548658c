"""Dtypes: which one holds every value of another, and descriptions of lossy casts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Final

import torch

_WIDER: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether `wide` can hold every number of the dtype `narrow`."""
    if wide == narrow:
        return True
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    ours, theirs = torch.finfo(wide), torch.finfo(narrow)
    least, their_least = ours.smallest_normal * ours.eps, theirs.smallest_normal * theirs.eps
    return ours.eps <= theirs.eps and ours.max >= theirs.max and least <= their_least


def joined(dtypes: Collection[torch.dtype]) -> torch.dtype:
    """Returns the smallest dtype that holds every value of `dtypes`: one of them if possible."""
    candidates = [*sorted(set(dtypes), key=lambda dtype: dtype.itemsize), *_WIDER]
    return next(wide for wide in candidates if all(holds(wide, narrow) for narrow in dtypes))


def name(dtype: torch.dtype) -> str:
    """Returns the dtype's name in config.json."""
    return str(dtype).removeprefix("torch.")


Casts = Mapping[str, tuple[torch.dtype, torch.dtype]]
"""Lossy casts by tensor: (its dtype, the dtype that it was cast to)."""


def described(casts: Casts, limit: int = 3) -> str:
    """Describes casts in words: the number of tensors from which dtype to which, and the first names."""
    kinds: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for tensor, pair in casts.items():
        kinds.setdefault(pair, []).append(tensor)
    said = []
    for (before, now), names in kinds.items():
        more = f" and {len(names) - limit} more" if len(names) > limit else ""
        said.append(f"{len(names)} from {name(before)} to {name(now)} ({', '.join(names[:limit])}{more})")
    return "; ".join(said)


def counted(dtypes: Collection[torch.dtype]) -> dict[str, int]:
    """Returns the number of each dtype, the most frequent first."""
    return {name(dtype): count for dtype, count in Counter(dtypes).most_common()}
