"""Infers the rows of a family file from the parts of an unknown model: weight rules, fields, and what is left to do."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from megabridge.conformance import architecture
from megabridge.conformance.architecture import EITHER, SIZES, UnknownModel
from megabridge.families.core.unread_keys import is_harmless, says_something

_ACTIVATIONS: Final = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh",
                       "gelu_new": "gelu_new", "relu": "relu", "relu2": "relu2"}  # fmt: skip
EPSILONS: Final = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "layernorm_epsilon")
_ROPES: Final = ("rope_parameters", "rope_scaling", "rope_theta")
# Keys whose meaning is the same in every architecture of transformers that has them.
_COMPUTING: Final = {
    "attn_logit_softcapping": 'Field("attention_softcap", "attn_logit_softcapping", None)',
    "final_logit_softcapping": 'Field("logits_softcap", "final_logit_softcapping", None)',
    "query_pre_attn_scalar": 'Converted("softmax_scale", "query_pre_attn_scalar", lambda value: value**-0.5, '
    "lambda value: round(value**-2, 6), 256)",
    "attention_multiplier": 'Field("softmax_scale", "attention_multiplier", 1.0)',
    "embedding_multiplier": 'Field("embedding_multiplier", "embedding_multiplier", 1.0)',
    "residual_multiplier": 'Field("residual_multiplier", "residual_multiplier", 1.0)',
    "logits_scaling": 'Converted("logits_multiplier", "logits_scaling", lambda value: 1 / value, lambda value: 1 / value, 1.0)',
    "logit_scale": 'Field("logits_multiplier", "logit_scale", 1.0)',
}
_QK_SWITCHES: Final = ("use_qk_norm", "qk_layernorm", "qk_norm")
_BIASES: Final = (
    ("add_qkv_bias", ("attention_bias", "qkv_bias", "use_qkv_bias", "use_bias", "bias")),
    ("add_attn_proj_bias", ("attention_out_bias", "attention_bias", "use_bias", "bias")),
    ("add_mlp_bias", ("mlp_bias", "use_bias", "bias")),
)


@dataclass
class DraftRows:
    """The rows of a family file: fields, rules outside the layers, rules of a layer, and what is left to a person."""

    fields: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    layer: list[str] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    """Keys of config.json that the fields account for."""

    def key(self, row: str, *keys: str) -> None:
        """Adds a field that reads `keys`."""
        self.fields.append(row)
        self.read.update(keys)


def infer_rows(model: UnknownModel, general: Collection[str] = ()) -> DraftRows:
    """Returns rows for all that is recognised, and a line for each tensor and key that isn't; `general` are keys of any model."""
    rows = DraftRows()
    outside = architecture.take_outside(model)
    _sizes(model, rows)
    has = {name: _has_bias(model, name) for name in ("qkv", "out", "mlp", "norm")}
    _qk_norms(model, rows)
    _attention(model, rows)
    is_gated = _mlp(model, rows)
    _norms(model, rows, has_bias=has["norm"])
    _activation(model, rows, is_gated=is_gated)
    for (native, keys), part in zip(_BIASES, ("qkv", "out", "mlp"), strict=True):
        _bias(model, rows, native, keys, has=has[part])
    _positions(model, rows, outside.positions)
    for key, row in _COMPUTING.items():
        if model.config.get(key) is not None:
            rows.key(row, key)
    rows.key("TIED" if outside.head is None else "UNTIED", "tie_word_embeddings")
    names = (outside.embed, outside.norm, outside.head or "lm_head")
    rows.outside.insert(0, _call("embeddings", names, ("model.embed_tokens", "model.norm", "lm_head")))
    _left_over(model, rows, general)
    return rows


def _call(name: str, given: tuple[str, ...], defaults: tuple[str, ...]) -> str:
    """Returns the source of a call, with as few arguments as the defaults allow."""
    used = max((number + 1 for number, (one, two) in enumerate(zip(given, defaults, strict=True)) if one != two), default=0)
    return f"{name}({', '.join(_quoted(text) for text in given[:used])})"


def _quoted(text: object) -> str:
    return '"' + text + '"' if isinstance(text, str) else repr(text)


def _sizes(model: UnknownModel, rows: DraftRows) -> None:
    found, default = model.sizes, model.defaults
    rows.read.update(found.values(), {"num_key_value_heads", "head_dim", "initializer_range"})
    width, hidden, heads = _head_width(model), model.size("hidden_size") or 1, model.size("num_attention_heads") or 1
    kv, head, positions = default.get("num_key_value_heads"), default.get("head_dim"), default.get("max_position_embeddings")
    if head is None and "kv_channels" not in found and width is not None and width != hidden // heads:
        head = width
    arguments = [f"kv={kv}"] if kv is not None else []
    arguments += [f"head={head}"] if head is not None else []
    arguments += [f"positions={positions or model.size('seq_length')}"] if positions or "seq_length" in found else []
    std = default.get("initializer_range", 0.02)
    arguments += [f"std={std}"] if std != 0.02 else []
    if all(key == SIZES[native][0] for native, key in found.items()) and "ffn_hidden_size" in found:
        rows.fields.append(f"*sizes({', '.join(arguments)})")
        return
    for native in SIZES:
        if native in found:
            end = ", 0.02" if native == "init_method_std" else ""
            rows.fields.append(f'Field("{native}", "{found[native]}"{end})')
        elif native == "num_query_groups":
            rows.fields.append(f'Derived("num_query_groups", lambda hf: hf["{found["num_attention_heads"]}"])')
        elif native == "kv_channels":
            heads_key, hidden_key = found["num_attention_heads"], found["hidden_size"]
            rows.fields.append(f'Derived("kv_channels", lambda hf: hf["{hidden_key}"] // hf["{heads_key}"])')
        elif native == "ffn_hidden_size":
            rows.fields.append(f'Derived("ffn_hidden_size", lambda hf: 4 * hf["{found["hidden_size"]}"])')


def _head_width(model: UnknownModel) -> int | None:
    """Returns the width of a head, from the rows of the query projection; None if unknown."""
    modules = model.group(architecture.TRIPLES)
    heads, hidden = model.size("num_attention_heads"), model.size("hidden_size")
    if heads is None or hidden is None:
        return None
    return hidden // heads if modules is None else model.layer[f"{modules[0]}.weight"][0] // heads


def _has_bias(model: UnknownModel, part: str) -> bool:
    """Whether a part's linears, or the norms, have biases."""
    places: dict[str, list[str] | None] = {
        "qkv": model.group(architecture.TRIPLES) or [model.module(architecture.FUSED) or ""],
        "out": [model.module(architecture.OUTS) or ""],
        "mlp": model.group((*architecture.GATED, *architecture.PLAIN)),
        "norm": [model.module((*architecture.PRE_ATTENTION, *architecture.PRE_MLP, EITHER)) or ""],
    }
    modules = places[part]
    return modules is not None and f"{modules[0]}.bias" in model.layer


def _weights(native: str, modules: list[str], layout: str, model: UnknownModel, *, is_transposed: bool = False) -> list[str]:
    """Returns the rules of a weight and its bias, written out in full, and removes their tensors from `model`."""
    out = []
    for leaf in ("weight", "bias"):
        if f"{modules[0]}.{leaf}" in model.layer:
            names = ", ".join(f'"{module}.{leaf}"' for module in modules)
            kind = f"Transpose({layout})" if is_transposed and leaf == "weight" else layout
            out.append(f'weight("{native}.{leaf}", {names}' + (f", layout={kind})" if kind else ")"))
            model.take(*(f"{module}.{leaf}" for module in modules))
    return out


def _take(model: UnknownModel, *modules: str) -> None:
    model.take(*(f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")))


def _attention(model: UnknownModel, rows: DraftRows) -> None:
    heads, hidden = model.size("num_attention_heads"), model.size("hidden_size")
    modules, fused, out = model.group(architecture.TRIPLES), model.module(architecture.FUSED), model.module(architecture.OUTS)
    if modules is not None and out is not None:
        prefix = modules[0].rpartition(".")[0]
        if modules[0].endswith("q_proj") and out.rpartition(".")[0] == prefix:
            rows.layer.append(_call("attention", (prefix, out.rpartition(".")[2]), ("self_attn", "o_proj")))
            _take(model, *modules, out)
            return
        rows.layer += _weights("self_attention.linear_qkv", modules, "QKV", model)
        rows.layer += _weights("self_attention.linear_proj", [out], "", model)
    elif fused is not None and out is not None:
        shape = model.layer[f"{fused}.weight"]
        is_transposed = shape[0] == hidden and shape[0] != shape[1]
        layout, other = ("Same()", "QKV_JOINED") if fused.endswith("query_key_value") else ("QKV_JOINED", "Same()")
        order = "q, k and v of each head together" if layout == "Same()" else "all q above all k above all v"
        rows.todo.append(f"{fused}: assumed to be {layout}, {order}; if recipe=compare says that its outputs differ, try {other}.")
        rows.layer += _weights("self_attention.linear_qkv", [fused], layout, model, is_transposed=is_transposed)
        rows.layer += _weights("self_attention.linear_proj", [out], "", model, is_transposed=is_transposed)
    else:
        rows.todo.append(
            f"no attention of {heads} heads was recognised: neither q, k, v and output, nor one tensor for q, k and v."
        )


def _mlp(model: UnknownModel, rows: DraftRows) -> bool:
    """Adds the rows of the MLP. Returns whether it is gated."""
    gated, plain = model.group(architecture.GATED), model.group(architecture.PLAIN)
    ffn, hidden = model.size("ffn_hidden_size"), model.size("hidden_size")
    if gated is not None:
        rows.layer.append(_call("gated_mlp", tuple(gated), ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")))
        _take(model, *gated)
        return True
    if plain is None:
        rows.todo.append("no MLP was recognised: neither gate, up and down, nor up and down.")
        return True
    shape = model.layer[f"{plain[0]}.weight"]
    if shape[0] == hidden and shape[1] != hidden:
        for native, module in zip(("mlp.linear_fc1", "mlp.linear_fc2"), plain, strict=True):
            rows.layer += _weights(native, [module], "", model, is_transposed=True)
        return False
    rows.layer.append(_call("plain_mlp", tuple(plain), ("mlp.up_proj", "mlp.down_proj")))
    _take(model, *plain)
    return ffn is not None and shape[0] == 2 * ffn


def _qk_norms(model: UnknownModel, rows: DraftRows) -> None:
    modules = model.group(architecture.QK)
    if modules is None:
        return
    shape = model.layer[f"{modules[0]}.weight"]
    width = model.size("kv_channels") or _head_width(model)
    kind = "heads" if len(shape) == 2 else "head" if shape[0] == width else "whole"
    switch = next((key for key in _QK_SWITCHES if model.get(key) is True), None)
    if switch is None:
        rows.fields.append(f'Fixed("qk_norm", "{kind}")')
    else:
        rows.key(f'Choice("qk_norm", "{switch}", ((False, None), (True, "{kind}")))', switch)
    rows.layer.append(_call("qk_norms", (modules[0], modules[1]), ("self_attn.q_norm", "self_attn.k_norm")))
    model.take(*(f"{module}.weight" for module in modules))


def _norms(model: UnknownModel, rows: DraftRows, *, has_bias: bool) -> None:
    key = next((key for key in EPSILONS if model.get(key) is not None), None)
    default = None if key is None else model.defaults.get(key, model.get(key))
    if key == "rms_norm_eps" and not has_bias:
        rows.key("*rms()" if default == 1e-6 else f"*rms({default})", key)
    else:
        is_rms = not has_bias and (key is None or not key.startswith("layer_norm"))
        rows.fields.append(f'Fixed("normalization", "{"RMSNorm" if is_rms else "LayerNorm"}")')
        rows.fields += [] if has_bias or is_rms else ['Fixed("norm_bias", False)']
        if not has_bias:
            rows.todo.append(
                f"the norms have no bias: assumed to be {'RMSNorm' if is_rms else 'LayerNorm without one'}; see the model's code."
            )
        if key is not None:
            rows.key(f'Field("layernorm_epsilon", "{key}", {default})', key)
    before, after, either = (
        model.module(architecture.PRE_ATTENTION),
        model.module(architecture.POST_ATTENTION),
        model.module((EITHER,)),
    )
    before_mlp, after_mlp = model.module(architecture.PRE_MLP), model.module(architecture.POST_MLP)
    if either is not None and before is not None and before_mlp is None:
        before_mlp = either
    elif either is not None and after is None:
        after = either
    if before is not None:
        rows.layer.insert(0, _call("pre_norms", (before, before_mlp or EITHER), ("input_layernorm", EITHER)))
        is_shared = before_mlp is None and after is None
        kind = "shared" if is_shared else "separate"
        if "use_parallel_residual" in model.config or "use_parallel_residual" in model.defaults:
            is_on = model.get("use_parallel_residual") is True
            pairs = f'((True, "{kind}"), (False, None))' if is_on else f'((False, None), (True, "{kind}"))'
            rows.key(f'Choice("parallel_residual", "use_parallel_residual", {pairs})', "use_parallel_residual")
        elif is_shared:
            rows.fields.append('Fixed("parallel_residual", "shared")')
    elif after is not None:
        rows.fields.append('Fixed("pre_norm", False)')
    else:
        rows.todo.append("no norm before or after the attention was recognised.")
    if after is not None and after_mlp is not None:
        rows.layer.insert(min(1, len(rows.layer)), _call("post_norms", (after, after_mlp), (EITHER, "post_feedforward_layernorm")))
        rows.fields.append('Fixed("post_norm", True)')
    _take(model, *(module for module in (before, before_mlp, after, after_mlp) if module is not None))


def _activation(model: UnknownModel, rows: DraftRows, *, is_gated: bool) -> None:
    key = next((key for key in ("hidden_activation", "hidden_act", "activation_function") if model.get(key)), None)
    value = model.get(key or "")
    if key == "hidden_act" and value in ("silu", "swish") and is_gated:
        rows.key("*GATED_SILU", key)
        return
    rows.fields.append(f'Fixed("gated_linear_unit", {is_gated})')
    if key is None:
        rows.fields.append('Fixed("activation_func", "silu")')
        rows.todo.append("config.json names no activation: assumed to be silu; see the model's code.")
    elif value in _ACTIVATIONS:
        rows.key(f'Choice("activation_func", "{key}", (("{value}", "{_ACTIVATIONS[value]}"),))', key)
    else:
        rows.todo.append(f"{key}={value!r} is none of {', '.join(_ACTIVATIONS)}: it needs a layer of its own.")


def _bias(model: UnknownModel, rows: DraftRows, native: str, keys: tuple[str, ...], *, has: bool) -> None:
    key = next((key for key in keys if model.get(key) is has), None)
    if key is not None:
        rows.key(f'Field("{native}", "{key}", {model.defaults.get(key) is True})', key)
    elif has:
        rows.fields.append(f'Fixed("{native}", True)')


def _positions(model: UnknownModel, rows: DraftRows, table: str | None) -> None:
    config = model.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if table is not None and not any(model.get(key) for key in _ROPES):
        rows.outside.append(f'weight("embedding.position_embeddings.weight", "{table}.weight")')
        rows.fields += ['Fixed("rope", None)', 'Fixed("learned_positions", True)']
        return
    _windows(model, rows)
    if "full_attention" in rope or "rope_local_base_freq" in config:
        rows.key("LayerRopes(theta=(10000.0, 10000.0))", *_ROPES, "rope_local_base_freq")
        return
    default = model.defaults.get("rope_parameters") or {}
    theta, partial = default.get("rope_theta", 10000.0), default.get("partial_rotary_factor")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", partial))
    arguments = [] if theta == 10000.0 else [f"theta={theta}"]
    arguments += [] if share in (None, 1, 1.0) else [f"partial={partial or share}"]
    rows.key(f"Rope({', '.join(arguments)})", *_ROPES, "partial_rotary_factor", "original_max_position_embeddings")


def _windows(model: UnknownModel, rows: DraftRows) -> None:
    config = model.config
    kinds = config.get("layer_types") or []
    if not config.get("sliding_window") and not kinds:
        return
    arguments = []
    usual = model.defaults.get("layer_types")
    if kinds or usual:
        rule = _pattern(usual or kinds)
        arguments.append(rule or "every(2)")
        if rule is None or not usual:
            rows.todo.append(
                f"config.json doesn't say which layers have a window: assumed to be {arguments[0]}; see the model's config class."
            )
    if model.defaults.get("sliding_window"):
        arguments.append(f"default={model.defaults['sliding_window']}")
    if "use_sliding_window" in config:
        arguments.append('switch="use_sliding_window"')
    patterns = [key for key in ("sliding_window_pattern", "max_window_layers") if key in config]
    if patterns:
        arguments.append(f"pattern_keys=({', '.join(_quoted(key) for key in patterns)},)")
    rows.key(f"SlidingWindow({', '.join(arguments)})", "sliding_window", "layer_types", "use_sliding_window", *patterns)


def _pattern(kinds: list[str]) -> str | None:
    """Returns the rule that gives `kinds`, if all layers but one in n have a window; else None."""
    for count in range(1, len(kinds) + 1):
        for first in range(count):
            if kinds == ["full_attention" if layer % count == first else "sliding_attention" for layer in range(len(kinds))]:
                return f"every({count})" if first == count - 1 else f"lambda hf, layer: layer % {count} != {first}"
    return None


def _left_over(model: UnknownModel, rows: DraftRows, general: Collection[str]) -> None:
    for name, shape in model.top.items():
        rows.todo.append(f"no rule for the tensor {name} {list(shape)}.")
    alike: dict[tuple[str, tuple[int, ...]], int] = {}
    for suffix, shape in model.layer.items():
        entry = (re.sub(r"(?<=\.)\d+(?=\.)", "*", suffix), shape)
        alike[entry] = max(alike.get(entry, 0), model.counts[suffix])
    for (suffix, shape), count in alike.items():
        where = "every layer" if count == model.layers else f"{count} of {model.layers} layers"
        rows.todo.append(f"no rule for the tensor {model.prefix}.{suffix} {list(shape)}, in {where}.")
    for key, value in model.config.items():
        if key not in rows.read and not is_harmless(key) and key not in general and says_something(value):
            rows.todo.append(f"no field reads the key {key!r}: {value!r}.")
