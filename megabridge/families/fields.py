"""Config fields: pairs of native and Hugging Face settings, each read in both directions.

The Hugging Face side is the content of a config.json as it was published, old keys and new ones; the native side uses
TransformerConfig's names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from megabridge.errors import ConfigError

Json = Mapping[str, Any]
REQUIRED: Final = object()

# Keys that say nothing about what the model computes.
INERT: Final = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id "
    "_name_or_path initializer_range attention_dropout hidden_dropout pretraining_tp auto_map "
    "residual_dropout resid_pdrop embd_pdrop attn_pdrop embedding_dropout classifier_dropout "
    "quantization_config".split()  # how weights are stored: quantization.py
)
# Keys that change what some architecture of transformers computes: a family that doesn't declare one refuses it when set.
COMPUTING: Final = frozenset(
    "sliding_window layer_types attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar logits_scaling "
    "logit_scale embedding_multiplier residual_multiplier attention_multiplier qk_norm use_qk_norm qk_layernorm "
    "num_experts num_local_experts n_routed_experts no_rope_layers no_rope_layer_interval "
    "clip_qkv parallel_attn use_parallel_residual partial_rotary_factor rotary_pct num_nextn_predict_layers "
    "kv_lora_rank q_lora_rank attention_chunk_size attn_temperature_tuning embedding_size add_cross_attention "
    "rope_local_base_freq swiglu_limit mup_width_multiplier".split()
)


class FieldLike(Protocol):
    """One fact of a config, readable from either side."""

    def keys(self) -> frozenset[str]:
        """The Hugging Face keys that it accounts for."""
        ...

    def read(self, hf: Json) -> dict[str, Any]:
        """Native settings from a config.json. Raises ConfigError naming key and value."""
        ...

    def write(self, native: Json) -> dict[str, Any]:
        """Hugging Face settings from native ones."""
        ...


@dataclass(frozen=True)
class Field:
    """`native` equals `hf`. Where the key is absent or null, `default` is a value or a function of the config."""

    native: str
    hf: str
    default: Any = REQUIRED

    def keys(self) -> frozenset[str]:
        return frozenset((self.hf,))

    def read(self, hf: Json) -> dict[str, Any]:
        value = hf.get(self.hf)
        if value is None:
            if self.default is REQUIRED:
                raise ConfigError(f"config.json must have {self.hf!r}; add it to the model's config.json or model.hf.")
            value = self.default(hf) if isinstance(self.default, Callable) else self.default  # type: ignore[arg-type]
        return {self.native: value}

    def write(self, native: Json) -> dict[str, Any]:
        return {self.hf: native[self.native]}


def unless_null(key: str, default: Any) -> Callable[[Json], Any]:
    """A default for an absent key; an explicit null means None."""
    return lambda hf: None if key in hf else default


@dataclass(frozen=True)
class Fixed:
    """`native` always has this value for the architecture; Hugging Face has no key for it."""

    native: str
    value: Any

    def keys(self) -> frozenset[str]:
        return frozenset()

    def read(self, hf: Json) -> dict[str, Any]:
        return {self.native: self.value}

    def write(self, native: Json) -> dict[str, Any]:
        if native[self.native] != self.value:
            raise ConfigError(
                f"{self.native}={native[self.native]!r} can't be written to config.json: this architecture always has "
                f"{self.value!r}; keep it."
            )
        return {}


@dataclass(frozen=True)
class Choice:
    """`native` and `hf` are names for the same thing; `pairs` maps Hugging Face's to ours (the first pair is the default)."""

    native: str
    hf: str
    pairs: tuple[tuple[Any, Any], ...]

    def keys(self) -> frozenset[str]:
        return frozenset((self.hf,))

    def read(self, hf: Json) -> dict[str, Any]:
        value = hf.get(self.hf, self.pairs[0][0])
        for theirs, ours in self.pairs:
            if theirs == value:
                return {self.native: ours}
        known = ", ".join(repr(theirs) for theirs, _ in self.pairs)
        raise ConfigError(f"{self.hf}={value!r} is not supported for this architecture; supported: {known}.")

    def write(self, native: Json) -> dict[str, Any]:
        for theirs, ours in self.pairs:
            if ours == native[self.native]:
                return {self.hf: theirs}
        raise ConfigError(f"{self.native}={native[self.native]!r} has no value of config.json's {self.hf!r}; change it back.")


@dataclass(frozen=True)
class Follows:
    """`native` follows from other keys of config.json, which have fields of their own; it is never written."""

    native: str
    value: Callable[[Json], Any]

    def keys(self) -> frozenset[str]:
        return frozenset()

    def read(self, hf: Json) -> dict[str, Any]:
        return {self.native: self.value(hf)}

    def write(self, native: Json) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Converted:
    """`native` is `forth(hf)`, and `hf` is `back(native)`. Where the key is absent or null, `default` is Hugging Face's value."""

    native: str
    hf: str
    forth: Callable[[Any], Any]
    back: Callable[[Any], Any]
    default: Any = REQUIRED

    def keys(self) -> frozenset[str]:
        return frozenset((self.hf,))

    def read(self, hf: Json) -> dict[str, Any]:
        value = Field(self.hf, self.hf, self.default).read(hf)[self.hf]
        return {self.native: self.forth(value)}

    def write(self, native: Json) -> dict[str, Any]:
        return {self.hf: self.back(native[self.native])}


@dataclass(frozen=True)
class Either:
    """`field`, which some files give under the name `other`; it is written under its own."""

    field: Field
    other: str

    def keys(self) -> frozenset[str]:
        return self.field.keys() | {self.other}

    def read(self, hf: Json) -> dict[str, Any]:
        value = hf.get(self.field.hf)
        return self.field.read({**hf, self.field.hf: hf.get(self.other) if value is None else value})

    def write(self, native: Json) -> dict[str, Any]:
        return self.field.write(native)


@dataclass(frozen=True)
class PerLayer:
    """`field`, whose value may be a list with an entry per layer; all layers must have the same."""

    field: Field

    def keys(self) -> frozenset[str]:
        return self.field.keys()

    def read(self, hf: Json) -> dict[str, Any]:
        value = hf.get(self.field.hf)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ConfigError(f"{self.field.hf}={value!r} can't be represented: all layers must have the same.")
            value = value[0]
        return self.field.read({**hf, self.field.hf: value})

    def write(self, native: Json) -> dict[str, Any]:
        return self.field.write(native)


@dataclass(frozen=True)
class Only:
    """A key that may only have these values: with any other the model would compute something else."""

    hf: str
    values: tuple[Any, ...]

    def keys(self) -> frozenset[str]:
        return frozenset((self.hf,))

    def read(self, hf: Json) -> dict[str, Any]:
        value = hf.get(self.hf, self.values[0])
        if value not in self.values:
            raise ConfigError(f"{self.hf}={value!r} can't be represented; supported: {', '.join(map(repr, self.values))}.")
        return {}

    def write(self, native: Json) -> dict[str, Any]:
        return {self.hf: self.values[0]}
