"""The rotary embedding types that can be computed, and what each needs in a Hugging Face `rope_parameters` dict.

From transformers/modeling_rope_utils.py. No torch: configs are checked before it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

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


def rope_problems(rope: Mapping[str, Any]) -> list[str]:
    """Everything in a Hugging Face `rope_parameters` dict that can't be represented, one sentence each."""
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
        f"rope_parameters.{name}={rope[name]!r} has no meaning for rope_type={kind!r}; remove it."
        for name in sorted(set(rope) - required - optional - _COMMON)
    ]
    return problems
