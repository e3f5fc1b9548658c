"""Config fields of positions: rotary embeddings, attention windows, and layers without either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from megabridge.errors import ConfigError, listed
from megabridge.families.fields import Json
from megabridge.rope import rope_problems

SLIDING: Final = "sliding_attention"
FULL: Final = "full_attention"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding settings: transformers 5's `rope_parameters`, or the older `rope_theta` with `rope_scaling`.

    The native side is one dict `rope` in the newer form: rope_type, rope_theta and the type's own settings. With `partial`, the
    share of a head that is rotated unless config.json says another, there is a native `rotary_percent` too. `default` are the
    settings of a config.json that has none; `channels` is a key that may hold the number of rotated channels instead of that share.
    """

    theta: float = 10000.0
    partial: float | None = None
    default: Mapping[str, Any] = field(default_factory=dict)
    channels: str | None = None

    def keys(self) -> frozenset[str]:
        names = {"rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings"}
        names |= {"partial_rotary_factor"} if self.partial is not None else set()
        return frozenset(names | ({self.channels} if self.channels is not None else set()))

    def read(self, hf: Json) -> dict[str, Any]:
        rope = read_rope(hf.get("rope_parameters") or hf.get("rope_scaling") or self.default, hf, self.theta)
        share = self.partial
        if self.channels is not None and hf.get(self.channels) is not None:
            share = hf[self.channels] / hf["head_dim"]
        share = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", share))
        if self.partial is None:
            if share not in (1, None) and rope["rope_type"] != "proportional":
                raise ConfigError(
                    f"partial_rotary_factor={share!r} is not supported for this architecture, which rotates whole heads; remove it."
                )
            return {"rope": checked(rope)}
        rope.pop("partial_rotary_factor", None)
        return {"rope": checked(rope), "rotary_percent": share}

    def write(self, native: Json) -> dict[str, Any]:
        rope = dict(native["rope"])
        out: dict[str, Any] = {"rope_parameters": rope}
        if rope["rope_type"] == "longrope":  # Phi3Config reads it from here
            out["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        if rope["rope_type"] == "dynamic":
            del rope["max_position_embeddings"]
        if self.partial is not None:
            rope["partial_rotary_factor"] = native["rotary_percent"]
        return out


def read_rope(given: Mapping[str, Any], hf: Json, theta: float) -> dict[str, Any]:
    """A rope_parameters dict, old or new, with what stands elsewhere in config.json filled in."""
    kind = given.get("rope_type") or given.get("type") or "default"
    rope = {**given, "rope_type": {"su": "longrope"}.get(kind, kind)}
    rope.pop("type", None)
    rope["rope_theta"] = rope.get("rope_theta") or hf.get("rope_theta") or theta
    length = hf.get("max_position_embeddings")
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", length)
    if rope["rope_type"] == "dynamic":
        rope["max_position_embeddings"] = length
    if rope["rope_type"] == "longrope":
        if hf.get("original_max_position_embeddings") is not None:
            rope["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
        original = rope.get("original_max_position_embeddings")
        if rope.get("factor") is None and original and length:
            rope["factor"] = length / original
    return {key: value for key, value in rope.items() if value is not None}


def checked(rope: dict[str, Any]) -> dict[str, Any]:
    """`rope`; raises ConfigError with all that can't be represented."""
    if problems := rope_problems(rope):
        raise ConfigError(listed(problems))
    return rope


@dataclass(frozen=True)
class LayerRopes:
    """Rotary settings of their own for layers with a window: `rope_parameters` by layer type, or the older flat keys.

    `theta` are the bases of (full, sliding) layers where config.json has none. Flat `rope_scaling` is for full layers only.
    """

    theta: tuple[float, float]
    local_key: str = "rope_local_base_freq"

    def keys(self) -> frozenset[str]:
        return frozenset(("rope_parameters", "rope_scaling", "rope_theta", self.local_key))

    def read(self, hf: Json) -> dict[str, Any]:
        given = hf.get("rope_parameters") or {}
        by_type = given if FULL in given or SLIDING in given else {FULL: given or hf.get("rope_scaling") or {}}
        full = read_rope(by_type.get(FULL) or {}, hf, self.theta[0])
        base = hf.get(self.local_key) or (hf.get("rope_theta") if self.theta[0] == self.theta[1] else None) or self.theta[1]
        local = read_rope(by_type.get(SLIDING) or {"rope_theta": base}, {**hf, "rope_theta": None}, base)
        return {"rope": checked(full), "local_rope": checked(local)}

    def write(self, native: Json) -> dict[str, Any]:
        return {"rope_parameters": {FULL: dict(native["rope"]), SLIDING: dict(native["local_rope"])}}


@dataclass(frozen=True)
class Windows:
    """Attention windows: `sliding_window` keys, the query's own included, in the layers that `layer_types` says.

    `is_windowed(config, layer index)` says it where config.json has no layer_types; None: all layers, and the architecture has no
    such key. `switch` is a key that turns windows on. With `nope_elsewhere`, layers without a window have no rotary embedding,
    where there are windows at all. `key` and `kind` are what config.json calls the size and such layers. Native:
    TransformerConfig's window_size, window_attn_skip_freq (1: window) and no_rope_freq.
    """

    is_windowed: Callable[[Json, int], bool] | None = None
    default: int | None = None
    switch: str | None = None
    nope_elsewhere: bool = False
    pattern_keys: tuple[str, ...] = ()
    key: str = "sliding_window"
    kind: str = SLIDING

    def keys(self) -> frozenset[str]:
        names = {self.key, *self.pattern_keys}
        names |= {self.switch} if self.switch else set()
        return frozenset(names | ({"layer_types"} if self.is_windowed is not None else set()))

    def read(self, hf: Json) -> dict[str, Any]:
        window = hf.get(self.key, self.default)
        if self.switch is not None and not hf.get(self.switch, False):
            window = None
        layers = range(hf.get("num_hidden_layers", 0))
        given = hf.get("layer_types") if self.is_windowed is not None else None
        if given is not None:
            wrong = sorted(set(given) - {self.kind, FULL})
            if wrong or len(given) != len(layers):
                raise ConfigError(f"layer_types must say {self.kind} or {FULL} for each of {len(layers)} layers; it is {given!r}.")
            flags = [kind == self.kind for kind in given]
        elif self.is_windowed is not None:
            flags = [window is not None and self.is_windowed(hf, layer) for layer in layers]
        else:
            flags = [window is not None for _ in layers]
        if window is None and any(flags):
            raise ConfigError(f"layer_types has {self.kind}, but there is no {self.key}; set it.")
        native: dict[str, Any] = {"window_size": None, "window_attn_skip_freq": None}
        if any(flags):
            native = {"window_size": (window - 1, 0), "window_attn_skip_freq": [int(flag) for flag in flags]}
        if self.nope_elsewhere:
            native["no_rope_freq"] = [int(not flag) for flag in flags] if window is not None and not all(flags) else None
        return native

    def write(self, native: Json) -> dict[str, Any]:
        size, layers = native["window_size"], native["num_layers"]
        flags = native["window_attn_skip_freq"] or [int(size is not None)] * layers
        out: dict[str, Any] = {self.key: None if size is None else size[0] + 1}
        if self.is_windowed is not None:
            out["layer_types"] = [self.kind if flag else FULL for flag in flags]
        elif size is not None and not all(flags):
            raise ConfigError("this architecture has the same window in all layers; use window_attn_skip_freq=None.")
        if self.switch is not None:
            out[self.switch] = size is not None
        return out


def every(period: str | int, default: int | None = None) -> Callable[[Json, int], bool]:
    """All layers have a window but each n-th; `period` is n, or the key that says it, `default` where it doesn't."""

    def is_windowed(hf: Json, layer: int) -> bool:
        count = period if isinstance(period, int) else hf.get(period, default)
        return bool(count) and bool((layer + 1) % count)

    return is_windowed
