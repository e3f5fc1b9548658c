"""Mixtures of experts: what families share of configs and weights.

All experts of a layer are one native parameter, [experts, out, in], whatever the backend; files have a tensor for each expert, or
one for all.
"""

from __future__ import annotations

from typing import Final

from megabridge.families.fields import REQUIRED, Choice, Field, FieldLike
from megabridge.families.parts import GATE_UP
from megabridge.mapping import Rows, weight
from megabridge.mapping.rules import Rules

EXPERTS: Final = "num_moe_experts"


# fmt: off
def mixture(
    *, experts: str = "num_experts", topk: str = "num_experts_per_tok", width: str = "moe_intermediate_size",
    aux: float | None = 0.001, defaults: tuple[object, object, object] = (REQUIRED, REQUIRED, REQUIRED),
) -> tuple[FieldLike, ...]:
    """Sizes of a mixture, by the keys that hold them; `defaults` are what the architecture's config class takes for absent ones.

    `aux` is its default weight of the load-balancing loss, which transformers adds where output_router_logits asks for it; None
    where it has none.
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


def router(gate: str = "mlp.gate", bias: str | None = None) -> Rules:
    """The gate's weight, and where there is one, the correction bias that chooses experts."""
    return (
        weight("mlp.router.weight",                f"{gate}.weight"),
        *(() if bias is None else (weight("mlp.router.expert_bias", bias),)),
    )


def experts(
    gate: str = "mlp.experts.{expert}.gate_proj",
    up: str = "mlp.experts.{expert}.up_proj",
    down: str = "mlp.experts.{expert}.down_proj",
) -> Rules:
    """Gated experts with tensors of their own."""
    return (
        weight("mlp.experts.linear_fc1.weight",    f"{gate}.weight", f"{up}.weight", layout=Rows(EXPERTS, GATE_UP)),
        weight("mlp.experts.linear_fc2.weight",    f"{down}.weight",                 layout=Rows(EXPERTS)),
    )


def shared_expert(prefix: str = "mlp.shared_expert", gate: str | None = None) -> Rules:
    """The expert that every token goes to; `gate` is what its output is weighed by."""
    return (
        weight("mlp.shared_experts.linear_fc1.weight", f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", layout=GATE_UP),
        weight("mlp.shared_experts.linear_fc2.weight", f"{prefix}.down_proj.weight"),
        *(() if gate is None else (weight("mlp.shared_experts.gate_weight", f"{gate}.weight"),)),
    )
