"""Which module stands for which part of a transformer layer, per backend.

`torch` is ours, `local` megatron-core's own as shipped, `te` Transformer Engine's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from megabridge.errors import ConfigError
from megabridge.layers.attention import TorchAttention
from megabridge.layers.norm import LayerNorm, RMSNorm

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

BACKENDS: Final = ("torch", "local", "te")


@dataclass(frozen=True)
class Biases:
    """Which linear layers of a transformer layer have a bias. megatron-core's add_bias_linear couples the last two."""

    qkv: bool = False
    proj: bool = False
    mlp: bool = False


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

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return RMSNorm if rms_norm else LayerNorm

    def core_attention(self) -> type:
        return TorchAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        return LocalSpecProvider().grouped_mlp_modules(moe_use_grouped_gemm)

    def activation_func(self) -> None:
        return None


def final_norm(backend: str, config: Any) -> Any:
    """The builder of the norm after the last layer."""
    rms_norm = config.normalization == "RMSNorm"
    if backend == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if backend == "local":
        return LocalSpecProvider().layer_norm(rms_norm=rms_norm)
    return TorchSpecProvider().layer_norm(rms_norm=rms_norm)


def layer_spec(backend: str, config: Any, biases: Biases) -> Any:
    """The spec of one transformer layer. Raises ConfigError for an unknown backend."""
    if backend == "torch":
        spec = _torch_layer_spec(config)
    elif backend == "local":
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            normalization=config.normalization,
        )
    elif backend == "te":
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
        )
    else:
        raise ConfigError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}.")
    return _with_biases(spec, biases)


def _torch_layer_spec(config: Any) -> Any:
    backend = TorchSpecProvider()
    rms_norm = config.normalization == "RMSNorm"
    qk_norm = backend.layer_norm(rms_norm=rms_norm, for_qk=True) if config.qk_layernorm else IdentityOp
    if config.qk_l2_norm:
        qk_norm = L2Norm
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=backend.layer_norm(rms_norm=rms_norm, has_residual=True),
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=backend.layer_norm(rms_norm=rms_norm, has_residual=True),
        mlp=get_mlp_module_spec_for_backend(
            backend=backend, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
        ),
        mlp_bda=get_bias_dropout_add,
        # Transformer Engine holds the norms inside the linears; checkpoints carry its names.
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def _with_biases(spec: Any, biases: Biases) -> Any:
    """The layer with the attention's biases as `biases` says; the MLP's follow config.add_bias_linear = biases.mlp."""
    attention = spec.submodules.self_attention
    linears = dataclasses.replace(
        attention.submodules,
        linear_qkv=_with_bias(attention.submodules.linear_qkv, biases.qkv),
        linear_proj=_with_bias(attention.submodules.linear_proj, biases.proj),
    )
    submodules = dataclasses.replace(spec.submodules, self_attention=dataclasses.replace(attention, submodules=linears))
    return dataclasses.replace(spec, submodules=submodules)


def _with_bias(linear: Callable[..., Any], bias: bool) -> Callable[..., Any]:
    """Builds `linear` with a bias of its own choice, not the one that config.add_bias_linear asks for."""

    @functools.wraps(linear, updated=())
    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **{**kwargs, "bias": bias})

    return build
