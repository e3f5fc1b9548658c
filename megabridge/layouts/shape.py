"""Shape of a decoder, from its native settings: matrices by layer, and how parallelism cuts them. No torch.

Biases, sinks and routers' correction biases are left out: together they are less than a thousandth of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal

from megabridge.config import layout_rules
from megabridge.config.layout_rules import Get

Cut = Literal["rows", "columns", "none"]
ATTENTION_LINEARS: Final = 4
"""Hugging Face linears of attention, q, k, v and o, that adapters stand beside."""


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns]; `cut` says what tensor parallelism cuts, `parts` how many Hugging Face linears are fused in it."""

    rows: int
    columns: int
    cut: Cut
    parts: int = 1

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def local(self, tp: int) -> tuple[int, int]:
        """(rows, columns) on one of `tp` ranks, rounded up."""
        rows = -(-self.rows // tp) if self.cut == "rows" else self.rows
        return rows, -(-self.columns // tp) if self.cut == "columns" else self.columns


@dataclass(frozen=True)
class Kind:
    """Layers that cost the same: whether they are mixtures, and how many positions a token sees at most (None: all before it)."""

    is_mixture: bool
    window: int | None


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `kinds` has one for each layer, multi-token-prediction layers last; `mtp` counts these."""

    hidden: int
    vocabulary: int
    heads: int
    groups: int
    key_width: int
    """Width of a head's queries and keys."""
    value_width: int
    attention: tuple[Matrix, ...]
    mlp: tuple[Matrix, ...]
    expert: tuple[Matrix, ...]
    shared: tuple[Matrix, ...]
    experts: int
    topk: int
    is_gated: bool
    is_tied: bool
    positions: int
    """Learned position embeddings."""
    norms: int
    """Norms of the hidden states in a layer."""
    norms_queries: bool
    activations: int
    """Tensors of the MLP's width that its activation keeps beside its input: one where it is one kernel."""
    caps_logits: bool
    latent: tuple[int, int]
    """Multi-latent attention: elements per token of the down-projections' outputs, and of these after their norms."""
    kinds: tuple[Kind, ...]
    mtp: int
    get: Get = field(repr=False, compare=False)

    @property
    def layers(self) -> int:
        """Number of layers, without those of multi-token prediction."""
        return len(self.kinds) - self.mtp

    @cached_property
    def matrices(self) -> dict[bool, tuple[Matrix, ...]]:
        """Matrices of a layer that every token passes through, by whether it is a mixture."""
        router = (Matrix(self.experts, self.hidden, "none", parts=0),)
        return {False: (*self.attention, *self.mlp), True: (*self.attention, *self.shared, *router)}

    def padded_vocabulary(self, tp: int) -> int:
        return layout_rules.padded_vocab_size(self.get, tp)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model, without padding."""
        per = {mixed: sum(matrix.size for matrix in found) + 2 * self.hidden for mixed, found in self.matrices.items()}
        per[True] += self.experts * sum(matrix.size for matrix in self.expert)
        tables = self.vocabulary * self.hidden * (1 if self.is_tied else 2) + self.positions * self.hidden + self.hidden
        return sum(per[kind.is_mixture] for kind in self.kinds) + tables + self.mtp * (2 * self.hidden**2 + 3 * self.hidden)

    def flops_per_token(self, seq_length: int, *, is_frozen: bool) -> float:
        """Returns the operations of a step per token, as in docs/training.md; `is_frozen` where only adapters are trained."""
        weights = self.vocabulary * self.hidden * (1 + self.mtp) + self.mtp * 2 * self.hidden**2
        attention = 0.0
        for kind in self.kinds:
            weights += sum(matrix.size for matrix in self.matrices[kind.is_mixture])
            if kind.is_mixture:
                weights += self.topk * sum(matrix.size for matrix in self.expert)
            attention += 2.0 * self.heads * (self.key_width + self.value_width) * seen(seq_length, kind.window)
        return (4 if is_frozen else 6) * weights + 3 * attention


def seen(seq_length: int, window: int | None) -> float:
    """Returns the positions that a token attends to on average."""
    most = seq_length if window is None else min(seq_length, window)
    return most - most * most / (2 * seq_length)


SIZES: Final = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
"""Native settings without which nothing is known of a decoder's shape."""


def is_known(get: Get) -> bool:
    """Returns whether the settings say a decoder's shape."""
    return all(get(name) is not None for name in SIZES)


def shape_of(get: Get) -> Shape:
    """Returns the shape that native settings describe, which must be known."""
    hidden, heads = get("hidden_size"), get("num_attention_heads")
    is_gated, is_latent = bool(get("gated_linear_unit")), bool(get("multi_latent_attention"))
    experts, mtp = get("num_moe_experts") or 0, get("mtp_num_layers") or 0
    width = get("moe_ffn_hidden_size") or layout_rules.ffn_width(get)
    shared = get("moe_shared_expert_intermediate_size")
    layers = get("num_layers")
    kinds = [Kind(layout_rules.has_experts(get, layer), _window(get, layer)) for layer in range(layers)]
    channels = get("kv_channels") or hidden // heads
    key = get("qk_head_dim") + get("qk_pos_emb_head_dim") if is_latent else channels
    groups = heads if is_latent else get("num_query_groups") or heads
    return Shape(
        hidden=hidden,
        vocabulary=get("vocab_size"),
        heads=heads,
        groups=groups,
        key_width=key,
        value_width=get("v_head_dim") if is_latent else channels,
        attention=_latent(get, hidden, heads) if is_latent else _attention(hidden, heads, groups, channels),
        mlp=_mlp(hidden, layout_rules.ffn_width(get), is_gated),
        expert=_mlp(hidden, width, is_gated) if experts else (),
        shared=_mlp(hidden, shared, is_gated) if experts and shared else (),
        experts=experts,
        topk=get("moe_router_topk") or 0,
        is_gated=is_gated,
        is_tied=bool(get("share_embeddings_and_output_weights")),
        positions=int(get("seq_length") or 0) if get("learned_positions") else 0,
        norms=2 * ((get("pre_norm") is not False) + bool(get("post_norm"))),
        norms_queries=bool(get("qk_norm") or get("qk_layernorm")) and not is_latent,
        activations=3 if is_gated and get("activation_func") != "silu" else 1,
        caps_logits=bool(get("logits_softcap")),
        latent=_latent_widths(get) if is_latent else (0, 0),
        kinds=(*kinds, *kinds[-1:] * mtp),
        mtp=mtp,
        get=lambda name: (get(name) or 1) if name == "make_vocab_size_divisible_by" else get(name),
    )


def _attention(hidden: int, heads: int, groups: int, channels: int) -> tuple[Matrix, ...]:
    fused = Matrix((heads + 2 * groups) * channels, hidden, "rows", parts=ATTENTION_LINEARS - 1)
    return fused, Matrix(hidden, heads * channels, "columns")


def _latent(get: Get, hidden: int, heads: int) -> tuple[Matrix, ...]:
    rank, latent, rotary, value = (get(name) for name in ("q_lora_rank", "kv_lora_rank", "qk_pos_emb_head_dim", "v_head_dim"))
    queries = heads * (get("qk_head_dim") + rotary)
    down = (Matrix(queries, hidden, "rows"),) if not rank else (Matrix(rank, hidden, "rows"), Matrix(queries, rank, "rows"))
    return (
        *down,
        Matrix(latent + rotary, hidden, "rows"),
        Matrix(heads * (get("qk_head_dim") + value), latent, "rows"),
        Matrix(hidden, heads * value, "columns"),
    )


def _latent_widths(get: Get) -> tuple[int, int]:
    ranks = (get("q_lora_rank") or 0) + get("kv_lora_rank")
    return ranks + get("qk_pos_emb_head_dim"), ranks


def _mlp(hidden: int, width: int, is_gated: bool) -> tuple[Matrix, ...]:
    up = 2 if is_gated else 1
    return Matrix(up * width, hidden, "rows", parts=up), Matrix(hidden, width, "columns")


def _window(get: Get, layer: int) -> int | None:
    """Positions that layer number `layer`, from 0, sees; megatron-core counts layers from 1 (is_layer_window_attention)."""
    window: Any = get("window_size")
    skip: Any = get("window_attn_skip_freq")
    if window is None:
        return None
    if isinstance(skip, int) and not isinstance(skip, bool):
        has_window = (layer + 1) % skip != 0
    else:
        has_window = skip is None or bool(skip[layer])
    return int(window[0]) + 1 if has_window else None


def windows(kinds: Sequence[Kind]) -> list[Kind]:
    """The kinds that there are, each once."""
    return list(dict.fromkeys(kinds))
