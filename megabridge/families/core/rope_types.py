"""Supported rope types, and the settings of each in a Hugging Face `rope_parameters` dict.

From transformers/modeling_rope_utils.py. No torch, because configs are checked before it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from megabridge.config.value_types import FLAG, Kind, list_of, number, shown, text, whole

POSITIONS: Final = whole(2, 2**31 - 1)
THETA: Final = number(1.0001, 1e15)
SHARE: Final = number(1e-3, 1)
_FACTOR: Final = number(1e-9, 1e9)
_SCALE: Final = number(0, 1e9)
# Allowed values of each setting, in all types that have it.
_KINDS: Final[Mapping[str, Kind]] = {
    "rope_type": text(),
    "type": text(),
    "rope_theta": THETA,
    "partial_rotary_factor": SHARE,
    "original_max_position_embeddings": POSITIONS,
    "max_position_embeddings": POSITIONS,
    **dict.fromkeys(
        (
            "factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "alpha",
            "short_mscale", "long_mscale",
        ),
        _FACTOR,
    ),
    **dict.fromkeys(("mscale", "mscale_all_dim", "llama_4_scaling_beta"), _SCALE),
    **dict.fromkeys(("long_factor", "short_factor"), list_of(_FACTOR)),
    "truncate": FLAG,
}  # fmt: skip
_COMMON: Final = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
# rope_type: (required keys, optional keys)
_KEYS: Final[Mapping[str, tuple[frozenset[str], frozenset[str]]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "dynamic": (frozenset({"factor", "max_position_embeddings"}), frozenset({"original_max_position_embeddings"})),
    "longrope": (
        frozenset({"factor", "long_factor", "short_factor", "original_max_position_embeddings"}),
        frozenset({"attention_factor"}),
    ),
    "proportional": (frozenset(), frozenset({"factor"})),
    "alpha": (frozenset({"alpha"}), frozenset()),  # HunYuan's, which its configs call dynamic
}
ROPE_TYPES: Final = tuple(_KEYS)


def value_problems(rope: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for every setting of any rope type whose value is invalid; null counts as absent."""
    given = [name for name, value in rope.items() if value is not None and name in _KINDS]
    return [f"rope_parameters.{problem}" for name in given if (problem := _KINDS[name].problem(rope, name)) is not None]


def rope_problems(rope: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for everything in a Hugging Face `rope_parameters` dict that can't be represented."""
    if problems := value_problems(rope):
        return problems
    kind = rope.get("rope_type", "default")
    if kind not in _KEYS:
        return [f"rope_type={kind!r} is not supported; use one of {', '.join(ROPE_TYPES)}."]
    if rope.get("type", kind) != kind:
        return [f"rope_type={kind!r} and its old name type={rope['type']!r} must agree; remove type."]
    required, optional = _KEYS[kind]
    problems = [
        f"rope_type={kind!r} needs {name}, which is missing; set it in rope_parameters."
        for name in sorted((required | {"rope_theta"}) - {name for name, value in rope.items() if value is not None})
    ]
    problems += [
        f"rope_parameters.{shown(name)[1:-1]}={shown(rope[name])} has no meaning for rope_type={kind!r}; remove it."
        for name in sorted(set(rope) - required - optional - _COMMON)
    ]
    return problems


def width_problems(rope: Mapping[str, Any], width: int) -> list[str]:
    """Returns the problems of a dict, which has no `rope_problems`, with `width` rotated channels per head."""
    kind, least = rope.get("rope_type", "default"), 4 if rope.get("rope_type") in ("dynamic", "alpha") else 2
    problems = []
    if width < least or width % 2:
        problems.append(f"{width} channels of a head rotate; rope_type={kind!r} needs an even number of at least {least}.")
    problems += [
        f"rope_parameters.{name} has {len(rope[name])} entries; it must have {width // 2}, one for each two channels that rotate."
        for name in ("long_factor", "short_factor")
        if kind == "longrope" and len(rope[name]) != width // 2
    ]
    return problems
