"""backend=local: megatron-core's own layers as shipped, for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, override

from megabridge.models.backends.backend import Backend, Get, torch_only, turned_on
from megabridge.models.layer_options import LayerOptions

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec

_UNKNOWN: Final[Mapping[str, object]] = {
    "fp8": None,
    "fp4": None,
    "tp_comm_overlap": False,
}


class LocalBackend(Backend):
    """Unfused attention, which keeps all scores; torch's norms; experts one after another."""

    name: ClassVar[str] = "local"

    @override
    def lacks(self, get: Get) -> Mapping[str, str]:
        return {**torch_only(get), **turned_on(get, _UNKNOWN)}

    @override
    def modules(self, options: LayerOptions) -> LocalSpecProvider:
        return LocalSpecProvider()

    @override
    def transformer_layer(self, config: Any, options: LayerOptions, experts: int | None) -> ModuleSpec:
        return get_gpt_layer_local_spec(
            num_experts=experts,
            moe_grouped_gemm=False,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            normalization=config.normalization,
            multi_latent_attention=config.multi_latent_attention,
        )
