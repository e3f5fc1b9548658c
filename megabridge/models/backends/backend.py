"""What a backend says of itself: its layers, the settings that it lacks, and where it runs."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import megabridge.platform as platform
from megabridge.models.layer_options import LayerOptions
from megabridge.models.layers.residual import Residual

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

Get = Callable[[str], Any]
"""Reads a setting of a ModelProvider by its name."""


class Backend(ABC):
    """A set of layers. One of another package is an instance of a subclass, named in the entry-point group `megabridge.backends`.

    Parameters have the names of megatron-core's layers, those of Transformer Engine's, or both: families have rules for these
    (megabridge/families/core/parts.py).
    """

    name: ClassVar[str]
    """What `backend=` calls it; of an installed one, the entry point's name too."""
    on_cpu: ClassVar[bool] = True
    """Whether its layers can be made and run in a CPU's memory."""
    has_adapters: ClassVar[bool] = True
    """Whether its linears are megatron-core's ColumnParallelLinear and RowParallelLinear, which adapters know."""

    def missing(self) -> str | None:
        """What keeps it from running in this process, as the end of a sentence that it begins; None where nothing does."""
        return "runs on CUDA only" if platform.is_cpu() and not self.on_cpu else None

    def lacks(self, get: Get) -> Mapping[str, str]:
        """The settings at values that its layers can't express, each with what to set instead, or "" where the model needs it."""
        return {}

    def adjusted(self, settings: Mapping[str, Any], get: Get) -> dict[str, Any]:
        """`settings`, the arguments of TransformerConfig, with what its layers want and nobody gave."""
        return dict(settings)

    def without_memory(self, config: Any) -> Backend:
        """The backend whose layers stand for its own on meta tensors. May change `config`, which is a copy for such layers."""
        return self

    # ------------------------------------------------------------------ layers

    @abstractmethod
    def modules(self, style: LayerOptions) -> BackendSpecProvider:
        """Its linears, norms, attention and experts, as megatron-core's spec builders ask for them."""

    @abstractmethod
    def transformer_layer(self, config: Any, style: LayerOptions, experts: int | None) -> ModuleSpec:
        """A layer with a mixture of `experts`, or a dense MLP. `layer` sets its biases and what is done to its residuals."""

    def norm(self, config: Any, style: LayerOptions) -> Any:
        """The builder of the norm after the last layer, of those after attention and MLP, and of multi-token prediction's."""
        return self.modules(style).layer_norm(rms_norm=config.normalization == "RMSNorm")

    def layer(self, config: Any, style: LayerOptions, *, has_experts: bool = False) -> ModuleSpec:
        """The spec of one transformer layer, with experts or a dense MLP."""
        spec = self.transformer_layer(config, style, config.num_moe_experts if has_experts else None)
        return self._with_residuals(_with_biases(spec, config, style), config, style)

    def mtp(self, config: Any, style: LayerOptions, layer: ModuleSpec, vp_stage: int | None) -> Any:
        """The spec of one chunk's multi-token-prediction layers, whose transformer layer is `layer`; None where it has none."""
        block = TransformerBlockSubmodules([layer])
        made = get_gpt_mtp_block_spec_for_backend(config, block, self.modules(style), vp_stage=vp_stage)
        norm = self.norm(config, style)
        for spec in () if made is None else made.layer_specs:  # megatron-core asks for LayerNorm whatever the model has
            spec.submodules = dataclasses.replace(spec.submodules, enorm=norm, hnorm=norm, layer_norm=norm)
        return made

    def _with_residuals(self, spec: ModuleSpec, config: Any, style: LayerOptions) -> ModuleSpec:
        """The layer with norms and factors on what attention and MLP add, in the place of megatron-core's bias-dropout-add."""
        if not style.post_norm and style.residual_multiplier == 1.0:
            return spec
        norm = self.norm(config, style) if style.post_norm else None
        params = {"config": config, "norm": norm, "multiplier": style.residual_multiplier}
        add = ModuleSpec(module=Residual, params=params)
        return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, self_attn_bda=add, mlp_bda=add))


def beyond_plain(get: Get) -> dict[str, str]:
    """What of a model only layers of our own express. Sinks: bf16 logits of gpt-oss are far off with Transformer Engine 2.20."""
    sinks = ["softmax_type"] if get("softmax_type") == "learnable" else []
    return dict.fromkeys([*LayerOptions.of(get).special(), *sinks], "")


def turned_on(get: Get, off: Mapping[str, object]) -> dict[str, str]:
    """Those of the settings that don't have the value which leaves them off, with how to turn them off."""
    return {name: f"{name}={value!r}" for name, value in off.items() if get(name) != value}


def _with_biases(spec: Any, config: Any, style: LayerOptions) -> Any:
    """The layer with the attention's biases as asked for; the MLP's follow config.add_bias_linear = style.add_mlp_bias."""
    attention = spec.submodules.self_attention
    changed = {"linear_proj": _with_bias(attention.submodules.linear_proj, style.add_attn_proj_bias)}
    if not config.multi_latent_attention:
        changed["linear_qkv"] = _with_bias(attention.submodules.linear_qkv, bool(config.add_qkv_bias))
    linears = dataclasses.replace(attention.submodules, **changed)
    submodules = dataclasses.replace(spec.submodules, self_attention=dataclasses.replace(attention, submodules=linears))
    return dataclasses.replace(spec, submodules=submodules)


def _with_bias(linear: Callable[..., Any], bias: bool) -> Callable[..., Any]:
    """Builds `linear` with a bias of its own choice, not the one that config.add_bias_linear asks for."""

    @functools.wraps(linear, updated=())
    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **{**kwargs, "bias": bias})

    return build
