"""Config fields of rotary embeddings (RoPE), attention windows, and layers without either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from megabridge.config.value_types import FLAG, OBJECT, SIZE, Kind, list_of, one_of, same, shown, whole
from megabridge.errors import ConfigError, listed
from megabridge.families.core.fields import Json, listing
from megabridge.families.core.ranges import COUNT, POSITIONS
from megabridge.families.core.rope_types import SHARE, THETA, rope_problems, value_problems

SLIDING: Final = "sliding_attention"
FULL: Final = "full_attention"
_OLD: Final = {"su": "longrope"}
# Top-level keys of config.json that also belong to a rotary embedding.
_FLAT: Final = ("rope_theta", "partial_rotary_factor", "max_position_embeddings", "original_max_position_embeddings")

PERIOD: Final = COUNT.or_null()
"""n if every n-th layer is different; null or 0 if none is."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding settings: transformers 5's `rope_parameters`, or the older `rope_theta` with `rope_scaling`.

    The native side is one dict `rope` in the newer form: rope_type, rope_theta and the type's own settings. With `partial`, the
    default share of a head that is rotated, there is a native `rotary_percent` too. `default` are the settings of a config.json
    that has none; `channels` is a key with the number of rotated channels instead of that share, of heads whose default width is
    `head`. `others` are the architecture's own names of rope_theta and partial_rotary_factor.
    """

    theta: float = 10000.0
    partial: float | None = None
    default: Mapping[str, Any] = field(default_factory=dict)
    channels: str | None = None
    head: int = 128
    others: Mapping[str, str] = field(default_factory=dict)

    def keys(self) -> Mapping[str, Kind]:
        kinds = {
            **dict.fromkeys(("rope_parameters", "rope_scaling"), OBJECT),
            "rope_theta": THETA,
            "partial_rotary_factor": SHARE,
            "original_max_position_embeddings": POSITIONS,
        }
        kinds |= {other: kinds[name] for name, other in self.others.items()}
        kinds |= {self.channels: SIZE} if self.channels is not None else {}
        return {key: kind.or_null() for key, kind in kinds.items()}

    def read(self, hf: Json) -> dict[str, Any]:
        flat = {key: hf.get(key) for key in (*_FLAT, "head_dim", *((self.channels,) if self.channels else ()))}
        flat |= {name: agreed(hf, name, other) for name, other in self.others.items()}
        return self.parse(given_rope(hf, self.default), flat)

    def parse(self, given: Mapping[str, Any], hf: Json) -> dict[str, Any]:
        """Returns the native settings of a rope_parameters dict, with `hf` as the flat keys. Subclasses override it."""
        rope = read_rope(given, hf, self.theta)
        share = self.partial
        nested, flat = rope.get("partial_rotary_factor"), hf.get("partial_rotary_factor")
        check_agrees("partial_rotary_factor", flat, nested)
        if self.channels is not None and hf.get(self.channels) is not None:
            share = hf[self.channels] / (hf.get("head_dim") or self.head)
            check_agrees(self.channels, share, flat if nested is None else nested)
        share = next((each for each in (nested, flat) if each is not None), share)
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


def agreed(hf: Json, *keys: str) -> Any:
    """Returns the value of the first of `keys` in config.json. Raises ConfigError if they contradict each other."""
    given = {key: hf.get(key) for key in keys if hf.get(key) is not None}
    if any(not same(value, next(iter(given.values()))) for value in given.values()):
        raise ConfigError(f"{listing(given)} contradict each other; remove one.")
    return next(iter(given.values()), None)


def check_agrees(key: str, flat: Any, nested: Any) -> None:
    """Raises ConfigError if a flat key and the same setting in rope_parameters contradict each other."""
    if flat is not None and nested is not None and not same(flat, nested):
        raise ConfigError(f"{key} says {shown(flat)}, but rope_parameters {shown(nested)}; remove one.")


def given_rope(hf: Json, default: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary settings in config.json under either name, else `default`, with the type as rope_type.

    Raises ConfigError for invalid values, and if both names are given and contradict each other.
    """
    new, old = (_typed(hf.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
    if new and old and not same(new, old):
        raise ConfigError(f"rope_parameters={shown(new)} and rope_scaling={shown(old)} contradict each other; remove one.")
    return new or old or dict(default)


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    if problems := value_problems(given):
        raise ConfigError(listed(problems))
    rope = {key: value for key, value in given.items() if key != "type" and value is not None}
    kinds = {_OLD.get(each, each) for key in ("rope_type", "type") if (each := given.get(key)) is not None}
    if len(kinds) > 1:
        raise ConfigError(f"rope_type={given['rope_type']!r} and its old name type={given['type']!r} must agree; remove type.")
    return {**rope, **({"rope_type": kinds.pop()} if kinds else {})}


def read_rope(given: Mapping[str, Any], hf: Json, theta: float) -> dict[str, Any]:
    """Returns `given` with missing settings filled in from flat keys of config.json. Raises ConfigError for contradictions."""
    check_agrees("rope_theta", hf.get("rope_theta"), given.get("rope_theta"))
    rope = {"rope_type": "default", "rope_theta": hf.get("rope_theta") or theta, **given}
    length, original = hf.get("max_position_embeddings"), hf.get("original_max_position_embeddings")
    if rope["rope_type"] in ("yarn", "longrope", "llama3"):
        check_agrees("original_max_position_embeddings", original, rope.get("original_max_position_embeddings"))
    if rope["rope_type"] == "yarn" and rope.get("original_max_position_embeddings") is None:
        if original not in (None, length):
            raise ConfigError(f"original_max_position_embeddings={original} must be in rope_parameters for yarn; move it there.")
        rope["original_max_position_embeddings"] = length
    if rope["rope_type"] == "dynamic":
        rope["max_position_embeddings"] = length
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"] = original or rope.get("original_max_position_embeddings")
        if rope.get("factor") is None and original and length:
            rope["factor"] = length / original
    return {key: value for key, value in rope.items() if value is not None}


def checked(rope: dict[str, Any]) -> dict[str, Any]:
    """Returns `rope`. Raises ConfigError with everything that can't be represented."""
    if problems := rope_problems(rope):
        raise ConfigError(listed(problems))
    return rope


@dataclass(frozen=True)
class LayerRopes:
    """Separate rotary settings for layers with a window: `rope_parameters` by layer type, or the older flat keys.

    `theta` are the default bases of (full, sliding) layers. Flat `rope_scaling` is for full layers only.
    """

    theta: tuple[float, float]
    local_key: str = "rope_local_base_freq"

    def keys(self) -> Mapping[str, Kind]:
        kinds = {"rope_parameters": OBJECT, "rope_scaling": OBJECT, "rope_theta": THETA, self.local_key: THETA}
        return {key: kind.or_null() for key, kind in kinds.items()}

    def read(self, hf: Json) -> dict[str, Any]:
        nested = hf.get("rope_parameters") or {}
        given: dict[str, Any] = {}
        if FULL in nested or SLIDING in nested:
            if hf.get("rope_scaling") or set(nested) - {FULL, SLIDING} or not all(map(OBJECT.or_null().allows, nested.values())):
                raise ConfigError(
                    f"rope_parameters={shown(nested)} must have {FULL} and {SLIDING} alone, an object each, and no rope_scaling "
                    "beside it; correct it."
                )
            given = {kind: given_rope({"rope_parameters": nested.get(kind)}, {}) for kind in (FULL, SLIDING)}
        else:
            given = {FULL: given_rope(hf, {})}
        flat = {key: hf.get(key) for key in _FLAT}
        full = read_rope(given[FULL], flat, self.theta[0])
        local, base = given.get(SLIDING, {}), hf.get(self.local_key)
        check_agrees(self.local_key, base, local.get("rope_theta"))
        base = base or (hf.get("rope_theta") if self.theta[0] == self.theta[1] else None) or self.theta[1]
        local = read_rope(local, {**flat, "rope_theta": None}, base)
        return {"rope": checked(full), "local_rope": checked(local)}

    def write(self, native: Json) -> dict[str, Any]:
        return {"rope_parameters": {FULL: dict(native["rope"]), SLIDING: dict(native["local_rope"])}}


@dataclass(frozen=True)
class SlidingWindow:
    """Attention windows of `sliding_window` keys, including the query's own, in the layers that `layer_types` lists.

    `is_windowed(config, layer index)` decides if config.json has no layer_types; None: all layers, and the architecture has no such
    key. `switch` is a key that turns windows on. With `nope_elsewhere`, layers without a window have no rotary embedding: if
    config.json has a window, or with "always" in any case. `key` and `kind` are config.json's names of the size and of such layers;
    `pattern_keys` are the keys that `is_windowed` reads, whose allowed values are `pattern`. Native: TransformerConfig's
    window_size, window_attn_skip_freq (1: window) and no_rope_freq.
    """

    is_windowed: Callable[[Json, int], bool] | None = None
    default: int | None = None
    switch: str | None = None
    nope_elsewhere: Literal["with windows", "always"] | None = None
    pattern_keys: tuple[str, ...] = ()
    pattern: Kind = PERIOD
    key: str = "sliding_window"
    kind: str = SLIDING

    def keys(self) -> Mapping[str, Kind]:
        size = POSITIONS if self.switch is None else whole(0, 2**31 - 1)  # transformers writes 0 where windows are off
        kinds = {self.key: size.or_null(), **dict.fromkeys(self.pattern_keys, self.pattern)}
        kinds |= {self.switch: FLAG.or_null()} if self.switch else {}
        kinds |= {"layer_types": list_of(one_of(self.kind, FULL)).or_null()} if self.is_windowed is not None else {}
        return kinds

    def read(self, hf: Json) -> dict[str, Any]:
        window = hf.get(self.key, self.default)
        if self.switch is not None and not hf.get(self.switch, False):
            window = None
        if window == 0:
            raise ConfigError(f"{self.key}=0 can't be represented where {self.switch} is true: it must be at least 1.")
        layers = range(hf.get("num_hidden_layers", 0))
        given = hf.get("layer_types") if self.is_windowed is not None else None
        if given is not None:
            if len(given) != len(layers):
                raise ConfigError(
                    f"layer_types must say {self.kind} or {FULL} for each of {len(layers)} layers, not for {len(given)}."
                )
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
        if self.nope_elsewhere is not None:
            is_nope = window is not None or self.nope_elsewhere == "always"
            native["no_rope_freq"] = [int(not flag) for flag in flags] if is_nope and not all(flags) else None
        return native

    def write(self, native: Json) -> dict[str, Any]:
        size, layers = native["window_size"], native["num_layers"]
        flags = native["window_attn_skip_freq"] or [int(size is not None)] * layers
        out: dict[str, Any] = {self.key: None if size is None else size[0] + 1}
        if size is None and self.nope_elsewhere == "with windows" and native["no_rope_freq"] is not None:
            out[self.key] = self.default  # no layer uses it, but without it all would have a rotary embedding
        if self.is_windowed is not None:
            out["layer_types"] = [self.kind if flag else FULL for flag in flags]
        elif size is not None and not all(flags):
            raise ConfigError("this architecture has the same window in all layers; use window_attn_skip_freq=None.")
        if self.switch is not None:
            out[self.switch] = size is not None
        return out


def every(period: str | int, default: int | None = None) -> Callable[[Json, int], bool]:
    """Returns a rule by which all layers but every n-th have a window; `period` is n, or its key with `default`."""

    def is_windowed(hf: Json, layer: int) -> bool:
        count = period if isinstance(period, int) else hf.get(period, default)
        return bool(count) and bool((layer + 1) % count)

    return is_windowed
