"""backend=te: NVIDIA Transformer Engine's layers, where the package is installed and there is CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, override

from megabridge.models.backends.backend import Backend, Get, torch_only
from megabridge.models.backends.torch_backend import TorchBackend
from megabridge.models.layer_options import LayerOptions

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec


class TransformerEngineBackend(Backend):
    """Norms inside the linears, fused attention, FP8, context parallelism."""

    name: ClassVar[str] = "te"
    on_cpu: ClassVar[bool] = False
    has_adapters: ClassVar[bool] = False

    @override
    def missing(self) -> str | None:
        return super().missing() or (None if HAVE_TE else "needs Transformer Engine, which is not installed")

    @override
    def lacks(self, get: Get) -> Mapping[str, str]:
        return torch_only(get)

    @override
    def adjusted(self, settings: Mapping[str, Any], get: Get) -> dict[str, Any]:
        has_experts = get("num_moe_experts") is not None
        wanted = {"apply_rope_fusion": not get("multi_latent_attention"), "moe_grouped_gemm": has_experts, **settings}
        return (
            {**wanted, "bias_dropout_fusion": False} if has_experts and get("add_mlp_bias") else wanted
        )  # TEGroupedMLP refuses it

    @override
    def without_memory(self, config: Any) -> Backend:
        config.fp8 = config.fp4 = None
        return TorchBackend()  # its own layers need a device

    @override
    def modules(self, options: LayerOptions) -> Any:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()

    @override
    def norm(self, config: Any, options: LayerOptions) -> Any:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm

    @override
    def transformer_layer(self, config: Any, options: LayerOptions, experts: int | None) -> ModuleSpec:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts,
            moe_grouped_gemm=True,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            multi_latent_attention=config.multi_latent_attention,
        )

    @override
    def mtp(self, config: Any, options: LayerOptions, layer: ModuleSpec, vp_stage: int | None) -> Any:
        return get_gpt_mtp_block_spec(config, layer, use_transformer_engine=True, vp_stage=vp_stage)
