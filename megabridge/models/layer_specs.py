"""Which module stands for which part of a transformer layer, per backend.

`torch` is ours, `local` megatron-core's own as shipped, `te` Transformer Engine's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

from megabridge.config import instantiate
from megabridge.errors import ConfigError
from megabridge.models.layer_options import LayerOptions
from megabridge.models.layers.attention import TorchAttention, TorchSelfAttention
from megabridge.models.layers.experts import GroupedExperts
from megabridge.models.layers.multi_latent_attention import mla_spec
from megabridge.models.layers.norm import HeadsNorm, LayerNorm, RMSNorm
from megabridge.models.layers.residual import ParallelLayer, Residual
from megabridge.models.layers.router import Router

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
)
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

BACKENDS: Final = ("torch", "local", "te")
_PLAIN: Final = LayerOptions()


class TorchSpecProvider(BackendSpecProvider):  # type: ignore[misc]
    """The `torch` backend, as megatron-core's spec builders ask for it (megatron/core/models/backends.py)."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear  # type: ignore[no-any-return]

    def row_parallel_linear(self) -> type:
        return RowParallelLinear  # type: ignore[no-any-return]

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        return None

    def __init__(self, style: LayerOptions = _PLAIN) -> None:
        self.style = style

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        if rms_norm:
            return RMSNorm
        return functools.partial(LayerNorm, bias=self.style.qk_norm_bias if for_qk else self.style.norm_bias)

    def core_attention(self) -> Any:
        own = self.style.core_attention
        chosen = TorchAttention if own is None else instantiate.named(own, where="core_attention")
        return functools.partial(chosen, style=self.style)

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        return GroupedExperts

    def activation_func(self) -> None:
        return None


def final_norm(backend: str, config: Any, style: LayerOptions) -> Any:
    """The builder of the norm after the last layer."""
    rms_norm = config.normalization == "RMSNorm"
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if backend == "local":
        return LocalSpecProvider().layer_norm(rms_norm=rms_norm)
    return TorchSpecProvider(style).layer_norm(rms_norm=rms_norm)


def layer_spec(backend: str, config: Any, style: LayerOptions, *, has_experts: bool = False) -> Any:
    """The spec of one transformer layer, with experts or a dense MLP. Raises ConfigError for an unknown backend."""
    experts = config.num_moe_experts if has_experts else None
    if backend == "torch":
        spec = _torch_layer_spec(config, style, experts)
    elif backend == "local":
        spec = get_gpt_layer_local_spec(
            num_experts=experts,
            moe_grouped_gemm=False,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            normalization=config.normalization,
            multi_latent_attention=config.multi_latent_attention,
        )
    elif backend == "te":
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts,
            moe_grouped_gemm=True,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            multi_latent_attention=config.multi_latent_attention,
        )
    else:
        raise ConfigError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}.")
    return _with_residuals(_with_biases(spec, config, style), config, style)


def mtp_spec(backend: str, config: Any, style: LayerOptions, layer: Any, vp_stage: int | None) -> Any:
    """The spec of one chunk's multi-token-prediction layers, whose transformer layer is `layer`; None where it has none."""
    known = {"torch": TorchSpecProvider(style), "local": LocalSpecProvider()}
    if backend == "te":
        return get_gpt_mtp_block_spec(config, layer, use_transformer_engine=True, vp_stage=vp_stage)
    made = get_gpt_mtp_block_spec_for_backend(config, TransformerBlockSubmodules([layer]), known[backend], vp_stage=vp_stage)
    norm = final_norm(backend, config, style)
    for spec in () if made is None else made.layer_specs:  # megatron-core asks for LayerNorm whatever the model has
        spec.submodules = dataclasses.replace(spec.submodules, enorm=norm, hnorm=norm, layer_norm=norm)
    return made


def _torch_layer_spec(config: Any, style: LayerOptions, experts: int | None) -> Any:
    backend = TorchSpecProvider(style)
    rms_norm = config.normalization == "RMSNorm"
    norm = backend.layer_norm(rms_norm=rms_norm, has_residual=True) if style.pre_norm else IdentityOp
    attention = mla_spec(backend, config) if config.multi_latent_attention else _attention(backend, config)
    submodules = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=IdentityOp if style.parallel_residual == "shared" else norm,
        mlp=get_mlp_module_spec_for_backend(backend=backend) if experts is None else _mixture(backend, experts),
        mlp_bda=get_bias_dropout_add,
        # Transformer Engine holds the norms inside the linears; checkpoints carry its names.
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    return ModuleSpec(module=ParallelLayer if style.parallel_residual else TransformerLayer, submodules=submodules)


def _attention(backend: TorchSpecProvider, config: Any) -> Any:
    return ModuleSpec(
        module=TorchSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=_qk_norm(backend, config, config.num_attention_heads),
            k_layernorm=_qk_norm(backend, config, config.num_query_groups),
        ),
    )


def _mixture(backend: TorchSpecProvider, experts: int) -> Any:
    """megatron-core's mixture of experts with our router."""
    mixture = get_moe_module_spec_for_backend(backend=backend, num_experts=experts, moe_grouped_gemm=True)
    parts = dataclasses.replace(
        mixture.keywords["submodules"], router=functools.partial(_router(backend.style), style=backend.style)
    )
    return functools.partial(mixture.func, submodules=parts)


def _router(style: LayerOptions) -> Any:
    return Router if style.router is None else instantiate.named(style.router, where="router")


def _qk_norm(backend: TorchSpecProvider, config: Any, heads: int) -> Any:
    """The builder of the norm of queries or keys, of which the model has `heads`."""
    if config.qk_l2_norm:
        return L2Norm
    if not config.qk_layernorm:
        return IdentityOp
    kind = backend.style.qk_norm
    if kind in ("rotated", "l2"):  # the core attention's, after the rotary embedding
        return lambda **_: None
    if kind in ("heads", "whole"):
        return functools.partial(HeadsNorm, heads=heads, whole=kind == "whole")
    return backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=True)


def _with_biases(spec: Any, config: Any, style: LayerOptions) -> Any:
    """The layer with the attention's biases as asked for; the MLP's follow config.add_bias_linear = style.add_mlp_bias."""
    attention = spec.submodules.self_attention
    changed = {"linear_proj": _with_bias(attention.submodules.linear_proj, style.add_attn_proj_bias)}
    if not config.multi_latent_attention:
        changed["linear_qkv"] = _with_bias(attention.submodules.linear_qkv, bool(config.add_qkv_bias))
    linears = dataclasses.replace(attention.submodules, **changed)
    submodules = dataclasses.replace(spec.submodules, self_attention=dataclasses.replace(attention, submodules=linears))
    return dataclasses.replace(spec, submodules=submodules)


def _with_residuals(spec: Any, config: Any, style: LayerOptions) -> Any:
    """The layer with norms and factors on what attention and MLP add, in the place of megatron-core's bias-dropout-add."""
    if not style.post_norm and style.residual_multiplier == 1.0:
        return spec
    norm = TorchSpecProvider(style).layer_norm(rms_norm=config.normalization == "RMSNorm") if style.post_norm else None
    params = {"config": config, "norm": norm, "multiplier": style.residual_multiplier}
    add = ModuleSpec(module=Residual, params=params)
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, self_attn_bda=add, mlp_bda=add))


def _with_bias(linear: Callable[..., Any], bias: bool) -> Callable[..., Any]:
    """Builds `linear` with a bias of its own choice, not the one that config.add_bias_linear asks for."""

    @functools.wraps(linear, updated=())
    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **{**kwargs, "bias": bias})

    return build
