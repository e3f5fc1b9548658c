"""Infers the parts of an unknown model from config.json and the names and shapes in safetensors headers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from megabridge.errors import ConfigError

Shape = tuple[int, ...]
# Keys of the sizes in config.json; the first is the one of `parts.sizes`.
SIZES: Final[Mapping[str, tuple[str, ...]]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "ffn_hidden_size": ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "d_ff"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_query_groups": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_kv_heads"),
    "kv_channels": ("head_dim", "attention_head_dim", "kv_channels"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "seq_length": ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"),
    "init_method_std": ("initializer_range",),
}
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")
_BUFFERS: Final = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
_EMBEDS: Final = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embedding", "embeddings")
_HEADS: Final = ("lm_head", "embed_out", "output", "output_layer", "head")
TRIPLES: Final = (("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv"), ("query", "key", "value"), ("q", "k", "v"))
FUSED: Final = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "qkv")
OUTS: Final = ("o_proj", "dense", "out_proj", "c_proj", "wo", "o")
GATED: Final = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate", "up", "down"))
PLAIN: Final = (
    ("up_proj", "down_proj"), ("c_fc", "c_proj"), ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h"), ("fc_in", "fc_out"),
    ("gate_up_proj", "down_proj"),
)  # fmt: skip
QK: Final = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"), ("query_norm", "key_norm"))
PRE_ATTENTION: Final = ("input_layernorm", "ln_1", "attention_norm", "norm1", "attn_norm", "operator_norm")
PRE_MLP: Final = ("pre_feedforward_layernorm", "ln_2", "ffn_norm", "norm2", "mlp_norm")
POST_ATTENTION: Final = ("post_self_attn_layernorm", "post_attention_norm")
POST_MLP: Final = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_feedforward_norm")
EITHER: Final = "post_attention_layernorm"  # before the MLP in Llama, after the attention in Gemma 2 and OLMo 2


@dataclass
class UnknownModel:
    """The config and tensors of an unknown model. `take` removes recognised tensors; those left at the end are unrecognised."""

    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    """Defaults of transformers' config class for keys that config.json lacks; empty if there is no such class."""
    top: dict[str, Shape]
    """Tensors outside the layers."""
    layer: dict[str, Shape]
    """Tensors of a layer by their name below `prefix`, including those that only some layers have."""
    counts: Counter[str]
    """Number of layers that have each tensor."""
    prefix: str
    """Name of a layer: `model.layers.{layer}`."""
    sizes: dict[str, str] = field(default_factory=dict)
    """Maps native names of sizes to keys of config.json."""
    ignored: list[str] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """Returns the value of a key of config.json, or its default if the key is absent."""
        value = self.config.get(key)
        return self.defaults.get(key) if value is None else value

    def size(self, native: str) -> int | None:
        value = self.get(self.sizes.get(native, SIZES[native][0]))
        return value if isinstance(value, int) else None

    @property
    def layers(self) -> int:
        return max(self.counts.values())

    def take(self, *suffixes: str) -> None:
        for suffix in suffixes:
            self.layer.pop(suffix, None)

    def module(self, names: tuple[str, ...]) -> str | None:
        """Returns the first module of a layer, outside numbered submodules (experts), whose own name is one of `names`."""
        for name in names:
            for suffix in self.layer:
                if _NUMBER.search(suffix) is not None:
                    continue
                if suffix == f"{name}.weight" or suffix.endswith(f".{name}.weight"):
                    return suffix.removesuffix(".weight")
        return None

    def group(self, choices: tuple[tuple[str, ...], ...]) -> list[str] | None:
        """Returns the modules of the first choice whose names all occur in the same parent module of a layer."""
        for names in choices:
            first = self.module(names[:1])
            if first is not None:
                modules = [first[: len(first) - len(names[0])] + name for name in names]
                if all(f"{module}.weight" in self.layer for module in modules):
                    return modules
        return None


def read_model(config: Mapping[str, Any], shapes: Mapping[str, Shape], defaults: Mapping[str, Any]) -> UnknownModel:
    """Sorts the tensors into those of layers and the rest. Raises ConfigError for a model without layers or without sizes."""
    prefixes = Counter(found[0] for name in shapes if (found := _split(name)) is not None)
    if not prefixes:
        raise ConfigError("a model must have layers, tensors with a number in their names, for a draft; this one has none.")
    prefix = prefixes.most_common(1)[0][0]
    top: dict[str, Shape] = {}
    layer: dict[str, Shape] = {}
    counts: Counter[str] = Counter()
    ignored: set[str] = set()
    for name, shape in shapes.items():
        split = _split(name)
        pattern = _NUMBER.sub("*", name)
        if any(name.endswith(buffer) for buffer in _BUFFERS) and f"{name[:-5]}.weight" not in shapes:
            ignored.add(pattern)
        elif split is None or split[0] != prefix:
            top[name] = shape
        else:
            layer[split[1]] = shape
            counts[split[1]] += 1
    keys = {native: next((key for key in names if config.get(key) is not None), "") for native, names in SIZES.items()}
    given = {native: key for native, key in keys.items() if key}
    model = UnknownModel(config, defaults, top, layer, counts, f"{prefix}.{{layer}}", given, sorted(ignored))
    missing = [
        native for native in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size") if model.size(native) is None
    ]
    if missing:
        names = "; ".join(f"{native}: {' or '.join(SIZES[native])}" for native in missing)
        raise ConfigError(f"config.json must say the model's sizes for a draft; it lacks {names}.")
    return model


def _split(name: str) -> tuple[str, str] | None:
    """Returns (prefix of the layers, name below the layer), or None outside layers."""
    found = _NUMBER.search(name)
    return None if found is None else (name[: found.start() - 1], name[found.end() + 1 :])


@dataclass(frozen=True)
class Outside:
    """Modules outside the layers; `head` is None without a separate output layer, `positions` without a position table."""

    embed: str
    norm: str
    head: str | None
    positions: str | None


def take_outside(model: UnknownModel) -> Outside:
    """Recognises embedding, output layer, last norm and position table, and removes their tensors from `model.top`."""
    table = (model.size("vocab_size"), model.size("hidden_size"))
    tables = [name.removesuffix(".weight") for name, shape in model.top.items() if shape == table]
    embed = next((name for name in tables if name.rpartition(".")[2] in _EMBEDS), "model.embed_tokens")
    head = next((name for name in tables if name.rpartition(".")[2] in _HEADS), None)
    norms = [name.removesuffix(".weight") for name, shape in model.top.items() if shape == table[1:] and name.endswith(".weight")]
    norm = norms[0] if norms else "model.norm"
    wide = (model.size("seq_length"), table[1])
    positions = next((name.removesuffix(".weight") for name, shape in model.top.items() if shape == wide and "wpe" in name), None)
    for name in (f"{embed}.weight", f"{head}.weight", f"{positions}.weight", f"{norm}.weight", f"{norm}.bias"):
        model.top.pop(name, None)
    return Outside(embed, norm, head, positions)
