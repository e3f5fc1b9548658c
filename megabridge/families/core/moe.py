"""Config fields and weight rules of mixtures of experts (MoE) that families share.

All experts of a layer are one native parameter, [experts, out, in], with every backend; files have a tensor for each expert, or one
for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from megabridge.config.value_types import Kind, list_of, one_of, shown
from megabridge.errors import ConfigError
from megabridge.families.core.fields import REQUIRED, Choice, Field, FieldLike, Fixed, Json, Repeats, given
from megabridge.families.core.parts import GATE_UP
from megabridge.families.core.ranges import COUNT, STEP
from megabridge.mapping import Layout, PerRow, Stack, block, weight
from megabridge.mapping.rules import Rules

EXPERTS: Final = "num_moe_experts"


@dataclass(frozen=True)
class DenseFirst:
    """The number `hf` of first layers with a dense MLP. Native: TransformerConfig's moe_layer_freq, 1 for a layer with experts."""

    hf: str = "first_k_dense_replace"
    default: int = 0

    def keys(self) -> Mapping[str, Kind]:
        return {self.hf: COUNT.or_null()}

    def read(self, hf: Json) -> dict[str, Any]:
        layers, dense = hf.get("num_hidden_layers", 0), hf.get(self.hf, self.default) or 0
        return {"moe_layer_freq": [int(layer >= dense) for layer in range(layers)]}

    def write(self, native: Json) -> dict[str, Any]:
        pattern = native["moe_layer_freq"]
        dense = pattern.index(1) if 1 in pattern else len(pattern)
        if not all(pattern[dense:]):
            raise ConfigError(f"moe_layer_freq={pattern} can't be written to config.json: only the first layers may be dense.")
        return {self.hf: dense}


@dataclass(frozen=True)
class LayerTypes:
    """`hf` lists for each layer whether it is sparse or dense; without it the first `dense_first` layers are dense, or their number
    is in the key `count`. Native: moe_layer_freq."""

    hf: str = "mlp_layer_types"
    dense_first: int = 0
    count: str | None = None

    def keys(self) -> Mapping[str, Kind]:
        kinds = {self.hf: list_of(one_of("dense", "sparse")).or_null()}
        return kinds if self.count is None else {**kinds, self.count: COUNT}

    def read(self, hf: Json) -> dict[str, Any]:
        layers = hf.get("num_hidden_layers", 0)
        kinds = hf.get(self.hf)
        if kinds is None:
            dense = self.dense_first if self.count is None else hf.get(self.count, self.dense_first)
            kinds = ["dense" if layer < dense else "sparse" for layer in range(layers)]
        if len(kinds) != layers:
            raise ConfigError(f"{self.hf} must say dense or sparse for each of {layers} layers, not for {len(kinds)}.")
        return {"moe_layer_freq": [int(kind == "sparse") for kind in kinds]}

    def write(self, native: Json) -> dict[str, Any]:
        return {self.hf: ["sparse" if mixed else "dense" for mixed in native["moe_layer_freq"]]}


@dataclass(frozen=True)
class SharedExperts:
    """`hf` is the number of shared experts, each as wide as a routed one; native is their total width."""

    hf: str = "n_shared_experts"
    default: int = 1
    width: tuple[str, Any] = ("moe_intermediate_size", REQUIRED)

    def keys(self) -> Mapping[str, Kind]:
        return {self.hf: COUNT.or_null()}

    def read(self, hf: Json) -> dict[str, Any]:
        count = hf.get(self.hf, self.default) or 0
        width = Field("width", *self.width).read(hf)["width"]
        return {"moe_shared_expert_intermediate_size": count * width if count else None}

    def write(self, native: Json) -> dict[str, Any]:
        return {self.hf: (native["moe_shared_expert_intermediate_size"] or 0) // native["moe_ffn_hidden_size"]}


@dataclass(frozen=True)
class Groups:
    """Group-limited routing: a token's experts are chosen from the best `topk_group` of `n_group` groups, if there are any.

    `method` is a key that turns groups on. `score` is the score of a group. Native: moe_router_num_groups, moe_router_group_topk,
    and router_group_score if megatron-core's is another.
    """

    defaults: tuple[int | None, int | None] = (None, None)
    method: str | None = None
    score: str = "top2"
    topk: tuple[str, int | None] = ("num_experts_per_tok", None)

    def keys(self) -> Mapping[str, Kind]:
        kinds = dict.fromkeys(("n_group", "topk_group"), STEP.or_null())
        return kinds if self.method is None else {**kinds, self.method: one_of("greedy", "group_limited_greedy")}

    def read(self, hf: Json) -> dict[str, Any]:
        groups, best = given(hf, "n_group", self.defaults[0]), given(hf, "topk_group", self.defaults[1])
        if self.method is not None:
            groups, best = (groups, best) if hf.get(self.method) == "group_limited_greedy" else (None, None)
        if (groups is None) != (best is None):
            raise ConfigError(f"n_group={groups} and topk_group={best} must be numbers both, or neither; set the other.")
        topk = given(hf, *self.topk)
        is_megatrons = not groups or groups == 1 or (self.score == "top2" and best and topk == 2 * best)
        return {
            "moe_router_num_groups": groups,
            "moe_router_group_topk": best,
            "router_group_score": None if is_megatrons else self.score,
        }

    def write(self, native: Json) -> dict[str, Any]:
        groups, best = native["moe_router_num_groups"], native["moe_router_group_topk"]
        out = {"n_group": groups, "topk_group": best}
        return out if self.method is None else {**out, self.method: "greedy" if groups is None else "group_limited_greedy"}


@dataclass(frozen=True)
class MtpLayers:
    """Number of multi-token-prediction layers in the published model; whether they are built is the user's choice."""

    hf: str = "num_nextn_predict_layers"
    default: int = 0

    def keys(self) -> Mapping[str, Kind]:
        return {self.hf: COUNT.or_null()}

    def read(self, hf: Json) -> dict[str, Any]:
        return {"hf_mtp_layers": hf.get(self.hf, self.default) or 0}

    def write(self, native: Json) -> dict[str, Any]:
        return {self.hf: native["hf_mtp_layers"]}


@dataclass(frozen=True)
class SparseStep:
    """Every n-th layer has experts, except those in mlp_only_layers. Native: moe_layer_freq."""

    def keys(self) -> Mapping[str, Kind]:
        return {"decoder_sparse_step": STEP, "mlp_only_layers": list_of(COUNT).or_null()}

    def read(self, hf: Json) -> dict[str, Any]:
        layers, step = hf.get("num_hidden_layers", 0), hf.get("decoder_sparse_step", 1)
        dense = {*(layers_named(hf, "mlp_only_layers") or ())}
        return {"moe_layer_freq": [int((layer + 1) % step == 0 and layer not in dense) for layer in range(layers)]}

    def write(self, native: Json) -> dict[str, Any]:
        pattern = native["moe_layer_freq"]
        step = pattern.index(1) + 1 if 1 in pattern else 1
        if pattern == [int((layer + 1) % step == 0) for layer in range(len(pattern))]:
            return {"decoder_sparse_step": step, "mlp_only_layers": []}
        return {"decoder_sparse_step": 1, "mlp_only_layers": [layer for layer, mixed in enumerate(pattern) if not mixed]}


def layers_named(hf: Json, key: str) -> list[int] | None:
    """Returns the layers, from 0, that a key of config.json lists; None if it is absent. Raises ConfigError for unknown layers."""
    named, layers = hf.get(key), hf.get("num_hidden_layers", 0)
    if any(layer >= layers for layer in named or ()):
        raise ConfigError(f"{key}={shown(named)} must list layers from 0 to {layers - 1}; correct it.")
    return None if named is None else list(named)


# fmt: off
# A softmax over all experts, or over a token's own, which equals normalising their probabilities.
SOFTMAX: Final[tuple[FieldLike, ...]] = (
    Fixed("moe_router_score_function",             "softmax"),
    Choice("moe_router_pre_softmax",               "norm_topk_prob", ((False, True), (True, False))),
)


def mtp_layers(layer: Rules, hf: str = "model.layers.{after}") -> Rules:
    """Rules of a multi-token-prediction layer; `layer` are those of its transformer layer."""
    return (
        *block("mtp.layers.{mtp}", hf,
            weight("enorm.weight",                 "enorm.weight"),
            weight("hnorm.weight",                 "hnorm.weight"),
            weight("eh_proj.weight",               "eh_proj.weight"),
            weight("final_layernorm.weight",       "shared_head.norm.weight"),
        ),
        *block("mtp.layers.{mtp}.mtp_model_layer", hf, layer),
    )


MTP_COPIES: Final = (
    ("model.layers.{after}.embed_tokens.weight", "model.embed_tokens.weight"),
    ("model.layers.{after}.shared_head.head.weight", "lm_head.weight"),
)
MTP_NAMES: Final = ("model.layers.{after}.*",)


def mixture(
    *, experts: str = "num_experts", topk: str = "num_experts_per_tok", width: str = "moe_intermediate_size",
    aux: float | None = 0.001, defaults: tuple[object, object, object] = (REQUIRED, REQUIRED, REQUIRED),
) -> tuple[FieldLike, ...]:
    """Sizes of a mixture of experts, by their keys; `defaults` are those of the architecture's config class.

    `aux` is the default coefficient of the load-balancing loss, which transformers adds if output_router_logits is true; None if
    the architecture has none.
    """
    loss = () if aux is None else (
        Field("moe_aux_loss_coeff",                "router_aux_loss_coef", aux),
        Choice("moe_router_load_balancing_type",   "output_router_logits", ((False, "none"), (True, "aux_loss"))),
    )
    return (
        Field("num_moe_experts",                   experts, defaults[0]),
        Field("moe_router_topk",                   topk,    defaults[1]),
        Field("moe_ffn_hidden_size",               width,   defaults[2]),
        *loss,
    )


def sigmoid_router(
    *, groups: tuple[int, int] = (1, 1), topk: int | None = None, normalize: bool = True, scale: float = 1.0
) -> tuple[FieldLike, ...]:
    """Router of DeepSeek-V3: sigmoid scores with a correction bias and groups; the arguments are for absent keys."""
    pairs = ((True, None), (False, False))
    return (
        Fixed("moe_router_score_function",         "sigmoid"),
        Fixed("moe_router_enable_expert_bias",     True),
        Choice("router_normalize",                 "norm_topk_prob", pairs if normalize else pairs[::-1]),
        Groups(defaults=groups, topk=("num_experts_per_tok", topk)),
        Field("moe_router_topk_scaling_factor",    "routed_scaling_factor", scale),
    )


def routing_notes(score: str, *methods: str) -> tuple[FieldLike, ...]:
    """Redundant keys about routing in DeepSeek-like files: transformers assumes their values."""
    return (
        Repeats("moe_layer_freq", 1),
        Repeats("scoring_func", score, *methods),
        *((Repeats("topk_method", *methods),) if methods else ()),
    )


def router(gate: str = "mlp.gate", bias: str | None = None) -> Rules:
    """Rules of the gate's weight and, if there is one, the correction bias."""
    return (
        weight("mlp.router.weight",                f"{gate}.weight"),
        *(() if bias is None else (weight("mlp.router.expert_bias", bias),)),
    )


def experts(
    gate: str = "mlp.experts.{expert}.gate_proj",
    up: str = "mlp.experts.{expert}.up_proj",
    down: str = "mlp.experts.{expert}.down_proj",
) -> Rules:
    """Rules of gated experts with one set of tensors per expert."""
    return (
        weight("mlp.experts.linear_fc1.weight",    f"{gate}.weight", f"{up}.weight", layout=PerRow(EXPERTS, GATE_UP)),
        weight("mlp.experts.linear_fc2.weight",    f"{down}.weight",                 layout=PerRow(EXPERTS)),
    )


def stacked_experts(gate_up: Layout, down: Layout, prefix: str = "mlp.experts") -> Rules:
    """Rules of gated experts with one tensor for all experts; the layouts are those of one expert."""
    return (
        weight("mlp.experts.linear_fc1.weight",    f"{prefix}.gate_up_proj", layout=Stack(EXPERTS, gate_up)),
        weight("mlp.experts.linear_fc2.weight",    f"{prefix}.down_proj",    layout=Stack(EXPERTS, down)),
    )


def shared_expert(prefix: str = "mlp.shared_expert", gate: str | None = None) -> Rules:
    """Rules of the shared expert; `gate` is the gate of its output."""
    return (
        weight("mlp.shared_experts.linear_fc1.weight", f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", layout=GATE_UP),
        weight("mlp.shared_experts.linear_fc2.weight", f"{prefix}.down_proj.weight"),
        *(() if gate is None else (weight("mlp.shared_experts.gate_weight", f"{gate}.weight"),)),
    )
