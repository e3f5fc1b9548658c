"""Backend, the base class of backends: the layers of one, the settings that it lacks, and where it runs."""

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
    """A set of layers. Another package registers an instance of a subclass in the entry-point group `megabridge.backends`.

    Parameters are named as in megatron-core's layers, as in Transformer Engine's, or as in both: families have rules for these
    names (megabridge/families/core/parts.py).
    """

    name: ClassVar[str]
    """The value of `backend=` that selects it; for an installed backend also the name of its entry point."""
    on_cpu: ClassVar[bool] = True
    """Whether its layers can be built and run on a CPU."""
    has_adapters: ClassVar[bool] = True
    """Whether its linears are megatron-core's ColumnParallelLinear and RowParallelLinear, which adapters need."""

    def missing(self) -> str | None:
        """The reason why it can't run in this process, as a predicate ("runs on CUDA only"); None where it can."""
        return "runs on CUDA only" if platform.is_cpu() and not self.on_cpu else None

    def lacks(self, get: Get) -> Mapping[str, str]:
        """Settings with values that its layers don't support, each with what to set instead, or "" where the model needs it.

        Sizes of the layout are among the settings (`context_parallel_size`, `sequence_parallel`). What ours can't do with
        them is said in config/layout_rules.py, before ranks start.
        """
        return {}

    def adjusted(self, settings: Mapping[str, Any], get: Get) -> dict[str, Any]:
        """Returns `settings`, the arguments of TransformerConfig, with the values that its layers need."""
        return dict(settings)

    def without_memory(self, config: Any) -> Backend:
        """Returns the backend that builds its layers on the meta device. May change `config`, a copy made for such layers."""
        return self

    # ------------------------------------------------------------------ layers

    @abstractmethod
    def modules(self, options: LayerOptions) -> BackendSpecProvider:
        """Returns its linears, norms, attention and experts in the form that megatron-core's spec builders take."""

    @abstractmethod
    def transformer_layer(self, config: Any, options: LayerOptions, experts: int | None) -> ModuleSpec:
        """Returns the spec of a layer with `experts` experts, or with a dense MLP for None; `layer` adds biases and residuals."""

    def norm(self, config: Any, options: LayerOptions) -> Any:
        """Returns the builder of the final norm, of norms after attention and MLP, and of those of multi-token prediction."""
        return self.modules(options).layer_norm(rms_norm=config.normalization == "RMSNorm")

    def layer(self, config: Any, options: LayerOptions, *, has_experts: bool = False) -> ModuleSpec:
        """Returns the spec of one transformer layer, with experts or a dense MLP."""
        spec = self.transformer_layer(config, options, config.num_moe_experts if has_experts else None)
        return self._with_residuals(_with_biases(spec, config, options), config, options)

    def mtp(self, config: Any, options: LayerOptions, layer: ModuleSpec, vp_stage: int | None) -> Any:
        """Returns the spec of a chunk's multi-token-prediction layers, built around `layer`; None where it has none."""
        block = TransformerBlockSubmodules([layer])
        made = get_gpt_mtp_block_spec_for_backend(config, block, self.modules(options), vp_stage=vp_stage)
        norm = self.norm(config, options)
        for spec in () if made is None else made.layer_specs:  # megatron-core always takes LayerNorm
            spec.submodules = dataclasses.replace(spec.submodules, enorm=norm, hnorm=norm, layer_norm=norm)
        return made

    def _with_residuals(self, spec: ModuleSpec, config: Any, options: LayerOptions) -> ModuleSpec:
        """Replaces megatron-core's bias-dropout-add where the outputs of attention and MLP have a norm or a factor."""
        if not options.post_norm and options.residual_multiplier == 1.0:
            return spec
        norm = self.norm(config, options) if options.post_norm else None
        params = {"config": config, "norm": norm, "multiplier": options.residual_multiplier}
        add = ModuleSpec(module=Residual, params=params)
        return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, self_attn_bda=add, mlp_bda=add))


def torch_only(get: Get) -> dict[str, str]:
    """Settings that only backend=torch supports. Sinks: with Transformer Engine 2.20 the bf16 logits of gpt-oss are far off."""
    sinks = ["softmax_type"] if get("softmax_type") == "learnable" else []
    return dict.fromkeys([*LayerOptions.of(get).torch_only(), *sinks], "")


def turned_on(get: Get, off: Mapping[str, object]) -> dict[str, str]:
    """The settings whose value is not the one in `off`, each with how to turn it off."""
    return {name: f"{name}={value!r}" for name, value in off.items() if get(name) != value}


def _with_biases(spec: Any, config: Any, options: LayerOptions) -> Any:
    """Sets the attention's biases; the MLP's follow config.add_bias_linear, which equals add_mlp_bias."""
    attention = spec.submodules.self_attention
    changed = {"linear_proj": _with_bias(attention.submodules.linear_proj, options.add_attn_proj_bias)}
    if not config.multi_latent_attention:
        changed["linear_qkv"] = _with_bias(attention.submodules.linear_qkv, bool(config.add_qkv_bias))
    linears = dataclasses.replace(attention.submodules, **changed)
    submodules = dataclasses.replace(spec.submodules, self_attention=dataclasses.replace(attention, submodules=linears))
    return dataclasses.replace(spec, submodules=submodules)


def _with_bias(linear: Callable[..., Any], bias: bool) -> Callable[..., Any]:
    """Returns a builder of `linear` with or without a bias, whatever config.add_bias_linear says."""

    @functools.wraps(linear, updated=())
    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **{**kwargs, "bias": bias})

    return build
