"""backend=torch: megabridge's own layers on torch's attention, for any device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Final, override

from megabridge.config import instantiate
from megabridge.models.backends.backend import Backend, Get, turned_on
from megabridge.models.layer_options import LayerOptions
from megabridge.models.layers.attention import TorchAttention, TorchSelfAttention
from megabridge.models.layers.experts import GroupedExperts
from megabridge.models.layers.multi_latent_attention import mla_spec
from megabridge.models.layers.norm import HeadsNorm, LayerNorm, RMSNorm
from megabridge.models.layers.residual import ParallelLayer
from megabridge.models.layers.router import Router

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

_UNKNOWN: Final[Mapping[str, object]] = {
    "apply_query_key_layer_scaling": False,
    "qk_clip": False,
    "log_max_attention_logit": False,
    "fp8": None,
    "fp4": None,
    "cpu_offloading": False,
    "tp_comm_overlap": False,
    "apply_rope_fusion": False,
}
"""Settings that its layers don't support, and the value that turns each off."""


class TorchModules(BackendSpecProvider):  # type: ignore[misc]
    """The modules of backend=torch, in the form that megatron-core's spec builders take (megatron/core/models/backends.py)."""

    def __init__(self, options: LayerOptions) -> None:
        self.options = options

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear  # type: ignore[no-any-return]

    def row_parallel_linear(self) -> type:
        return RowParallelLinear  # type: ignore[no-any-return]

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        return None

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        if rms_norm:
            return RMSNorm
        return functools.partial(LayerNorm, bias=self.options.qk_norm_bias if for_qk else self.options.norm_bias)

    def core_attention(self) -> Any:
        own = self.options.core_attention
        chosen = TorchAttention if own is None else instantiate.named(own, where="core_attention")
        return functools.partial(chosen, options=self.options)

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        return GroupedExperts

    def activation_func(self) -> None:
        return None


class TorchBackend(Backend):
    """SDPA, varlen and flex attention, fused norms on CUDA, grouped experts. A subclass may change any one part of the layer."""

    name: ClassVar[str] = "torch"

    @override
    def lacks(self, get: Get) -> Mapping[str, str]:
        off_by_one = {"softmax_type": ""} if get("softmax_type") == "off-by-one" else {}
        return {**turned_on(get, _UNKNOWN), **off_by_one}

    @override
    def modules(self, options: LayerOptions) -> TorchModules:
        return TorchModules(options)

    @override
    def transformer_layer(self, config: Any, options: LayerOptions, experts: int | None) -> ModuleSpec:
        modules = self.modules(options)
        norm = modules.layer_norm(rms_norm=config.normalization == "RMSNorm", has_residual=True) if options.pre_norm else IdentityOp
        submodules = TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=self.attention(modules, config),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if options.parallel_residual == "shared" else norm,
            mlp=self.mlp(modules, config) if experts is None else self.moe(modules, config, experts),
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine has the norms inside the linears; checkpoints use its names.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        )
        return ModuleSpec(module=ParallelLayer if options.parallel_residual else TransformerLayer, submodules=submodules)

    def attention(self, modules: TorchModules, config: Any) -> Any:
        """Returns the spec of self-attention."""
        if config.multi_latent_attention:
            return mla_spec(modules, config)
        return ModuleSpec(
            module=TorchSelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=modules.column_parallel_linear(),
                core_attention=modules.core_attention(),
                linear_proj=modules.row_parallel_linear(),
                q_layernorm=_qk_norm(modules, config, config.num_attention_heads),
                k_layernorm=_qk_norm(modules, config, config.num_query_groups),
            ),
        )

    def mlp(self, modules: TorchModules, config: Any) -> Any:
        """Returns the spec of a dense MLP."""
        return get_mlp_module_spec_for_backend(backend=modules)

    def moe(self, modules: TorchModules, config: Any, experts: int) -> Any:
        """Returns the spec of megatron-core's mixture of experts with our router."""
        mixture = get_moe_module_spec_for_backend(backend=modules, num_experts=experts, moe_grouped_gemm=True)
        options = modules.options
        router = Router if options.router is None else instantiate.named(options.router, where="router")
        parts = dataclasses.replace(mixture.keywords["submodules"], router=functools.partial(router, options=options))
        return functools.partial(mixture.func, submodules=parts)


def _qk_norm(modules: TorchModules, config: Any, heads: int) -> Any:
    """Returns the builder of the norm of queries or keys; `heads` is their number over all ranks."""
    if config.qk_l2_norm:
        return L2Norm
    if not config.qk_layernorm:
        return IdentityOp
    kind = modules.options.qk_norm
    if kind in ("rotated", "l2"):  # applied by the core attention, after the rotary embedding
        return lambda **_: None
    if kind in ("heads", "whole"):
        return functools.partial(HeadsNorm, heads=heads, whole=kind == "whole")
    return modules.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=True)
