"""Settings of a ModelProvider: names, defaults, derived values, and the rules that `finalize` checks."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F

import megabridge.platform as platform
from megabridge.config import layout_rules
from megabridge.config.pipeline_split import layout_of, split_layers
from megabridge.errors import ConfigError
from megabridge.families.core.rope_types import rope_problems, width_problems
from megabridge.models import layer_options
from megabridge.models.backends import chosen
from megabridge.models.backends.registry import problems as backend_problems
from megabridge.models.layers.multi_latent_attention import rotary_scale
from megabridge.parallel.topology import Topology

from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

ACTIVATIONS: Final[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": squared_relu,
    "quick_gelu": quick_gelu,
}
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NORMALIZATIONS: Final = ("RMSNorm", "LayerNorm")


@functools.cache
def config_fields() -> dict[str, object]:
    """Every field of megatron-core's TransformerConfig, and those that its MLA variant adds, with their defaults."""
    return {
        field.name: field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        for config in (MLATransformerConfig, TransformerConfig)  # the second wins: it has no multi_latent_attention
        for field in dataclasses.fields(config)
        if field.init and not field.name.startswith("_")
    }


# Settings that TransformerConfig lacks.
OWN_FIELDS: Final[Mapping[str, object]] = {
    "vocab_size": None,
    "seq_length": 2048,
    "share_embeddings_and_output_weights": False,
    "rotary_percent": 1.0,
    "rope": None,
    "backend": "auto",
    "adapted": False,  # whether the model gets adapters, which need linears of certain classes
    "make_vocab_size_divisible_by": 1,
    "transformer_layer_spec": None,
    "hf_mtp_layers": 0,  # number in the Hugging Face model; mtp_num_layers says whether they are built
    **layer_options.DEFAULTS,
}


def our_defaults() -> dict[str, object]:
    """Defaults of a provider that differ from TransformerConfig's. Values that a family or a user sets win."""
    on_cuda = not platform.is_cpu()
    return {
        "hidden_dropout": 0.0,  # Hugging Face's causal models have none
        "attention_dropout": 0.0,
        "add_bias_linear": None,  # follows from add_mlp_bias
        "bias_dropout_fusion": on_cuda,  # fused by torch.compile, which a CPU run does without (platform/patches/no_compile.py)
        "deallocate_pipeline_outputs": True,
        "gradient_accumulation_fusion": on_cuda,
        "cuda_graph_modules": [],  # TransformerConfig's own default is deprecated, and warns
        "moe_router_load_balancing_type": "none",  # transformers adds its loss on request only
        "moe_router_bias_update_rate": 0.0,  # a correction bias is updated on request only
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": None,  # follows from the device
    }


def default(name: str) -> object:
    """The default of a setting. Raises UnknownSetting for a name that does not exist."""
    ours = our_defaults()
    for known in (OWN_FIELDS, ours, config_fields()):
        if name in known:
            return known[name]
    raise UnknownSetting(name)


def is_known(name: str) -> bool:
    return name in OWN_FIELDS or name in config_fields()


class UnknownSetting(ConfigError, AttributeError):
    """An unknown name of a setting. Also an AttributeError, so that copying and inspecting a provider work."""

    def __init__(self, name: str) -> None:
        near = difflib.get_close_matches(name, [*OWN_FIELDS, *config_fields()], n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "see TransformerConfig of megatron-core for the names."
        super().__init__(f"a model provider has no setting {name!r}; {remedy}")


def problems_of(get: Callable[[str], Any]) -> list[str]:
    """Returns a sentence for every rule that the settings break: the rule, the value, the remedy. `get` reads a setting."""
    missing = [
        f"{name} must be set to a positive number; it is {get(name)!r}."
        for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
        if not isinstance(get(name), int) or get(name) < 1
    ]
    padding = get("make_vocab_size_divisible_by")
    if not isinstance(padding, int) or padding < 1:
        missing.append(f"make_vocab_size_divisible_by={padding!r} must be a positive whole number.")
    try:
        topology = Topology.of_settings(get)
    except ConfigError as error:
        missing.append(str(error))
    if missing:  # the other rules divide by these
        return missing
    if problems := _size_problems(get):
        return problems
    try:
        backend = chosen(get)
    except ConfigError as error:
        return [*_router_problems(get), *_layer_problems(get), str(error)]
    layout = layout_rules.model_problems(get, topology, backend=backend.name)
    return [*layout, *_router_problems(get), *_layer_problems(get), *backend_problems(backend, get)]


def _size_problems(get: Callable[[str], Any]) -> list[str]:
    """Sizes that contradict each other under any layout."""
    heads, hidden = get("num_attention_heads"), get("hidden_size")
    groups = get("num_query_groups") or heads
    problems = []
    if heads % groups:
        allowed = layout_rules.one_of(layout_rules.divisors(heads))
        problems.append(f"num_query_groups={groups} must divide num_attention_heads={heads}; use {allowed}.")
    if get("kv_channels") is None and hidden % heads:
        problems.append(
            f"num_attention_heads={heads} must divide hidden_size={hidden} when kv_channels is not set; set kv_channels."
        )
    return problems


def _router_problems(get: Callable[[str], Any]) -> list[str]:
    experts = get("num_moe_experts")
    if experts is None:
        return []
    problems = []
    topk = get("moe_router_topk")
    if not isinstance(topk, int) or not 0 < topk <= experts:
        problems.append(f"moe_router_topk={topk!r} must be a number from 1 to num_moe_experts={experts}; set it.")
    groups, best = get("moe_router_num_groups"), get("moe_router_group_topk")
    if groups and not problems and (experts % groups or not best or not topk <= best * experts // groups <= experts):
        problems.append(
            f"moe_router_num_groups={groups} must divide num_moe_experts={experts}, and moe_router_group_topk={best} of them hold "
            f"moe_router_topk={topk} experts; set them so."
        )
    if get("moe_router_bias_update_rate") and not get("moe_router_enable_expert_bias"):
        problems.append(
            f"moe_router_bias_update_rate={get('moe_router_bias_update_rate')} moves no bias without moe_router_enable_expert_bias "
            "and sigmoid scores; leave it at 0."
        )
    return problems


def _layer_problems(get: Callable[[str], Any]) -> list[str]:
    """Settings of layers that no backend supports, or that contradict each other."""
    mtp, published = get("mtp_num_layers") or 0, get("hf_mtp_layers")
    problems = [*_named_problems(get), *_rope_problems(get)]
    bias, mlp = get("add_bias_linear"), get("add_mlp_bias")
    if bias is not None and bias != mlp:
        problems.append(
            f"add_bias_linear={bias} must equal add_mlp_bias={mlp}; leave it unset, and set add_qkv_bias, "
            "add_attn_proj_bias and add_mlp_bias."
        )
    partial = (get("rope") or {}).get("partial_rotary_factor")
    if partial is not None and partial != get("rotary_percent"):
        problems.append(f"rope's partial_rotary_factor={partial} must equal rotary_percent={get('rotary_percent')}; set it so.")
    if mtp not in (0, published):
        problems.append(f"mtp_num_layers={mtp} must be 0, or {published} as the model has.")
    return problems


def _rope_problems(get: Callable[[str], Any]) -> list[str]:
    channels = get("kv_channels") or get("hidden_size") / get("num_attention_heads")
    width = get("qk_pos_emb_head_dim") if get("multi_latent_attention") else int(channels * get("rotary_percent"))
    ropes = [rope for rope in (get("rope"), get("local_rope")) if rope is not None]
    problems = [problem for rope in ropes for problem in rope_problems(rope)]
    is_whole = channels == int(channels)  # otherwise that is reported
    return problems or [problem for rope in ropes if is_whole for problem in width_problems(rope, width)]


def _named_problems(get: Callable[[str], Any]) -> list[str]:
    problems = []
    if get("normalization") not in NORMALIZATIONS:
        problems.append(f"normalization={get('normalization')!r} must be one of {', '.join(NORMALIZATIONS)}.")
    activation = get("activation_func")
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        problems.append(f"activation_func={activation!r} must be one of {', '.join(ACTIVATIONS)}, or a function.")
    dtype = get("params_dtype")
    if isinstance(dtype, str) and dtype not in DTYPES:
        problems.append(f"params_dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    if get("bf16") and get("fp16"):
        problems.append("bf16=True and fp16=True can't both be; set one of them.")
    for flag, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if get(flag) and DTYPES.get(dtype, dtype) not in (wanted, torch.float32):
            problems.append(f"{flag}=True and params_dtype={dtype} contradict each other; set params_dtype alone.")
    return problems


def config_settings(get: Callable[[str], Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of TransformerConfig: the given values, our defaults, and values derived from both."""
    known = {field.name for field in dataclasses.fields(config_class(get))}
    settings = {name: value for name, value in {**our_defaults(), **given}.items() if name in known}
    dtype = DTYPES.get(get("params_dtype"), get("params_dtype"))
    if get("bf16"):
        dtype = torch.bfloat16
    if get("fp16"):
        dtype = torch.float16
    activation = ACTIVATIONS.get(get("activation_func"), get("activation_func"))
    gated = get("gated_linear_unit")
    settings |= {
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "activation_func": activation,
        "add_bias_linear": bool(get("add_mlp_bias")),
        "qk_layernorm": bool(get("qk_layernorm") or get("qk_norm")),
        "gradient_accumulation_fusion": False,  # turned on where there is a buffer to add to (platform/patches/wgrad_products.py)
    }
    settings.setdefault("pipeline_dtype", dtype)
    if settings["moe_token_dispatcher_type"] is None:
        etp = get("expert_tensor_parallel_size") or get("tensor_model_parallel_size")
        # gloo has no all-gather of unequal sizes, which all-to-all with expert tensor parallelism needs.
        settings["moe_token_dispatcher_type"] = "allgather" if platform.is_cpu() and etp > 1 else "alltoall"
    # megatron-core's fused gelu is always the tanh approximation.
    settings.setdefault("bias_activation_fusion", gated and activation is F.silu)
    vpp = get("virtual_pipeline_model_parallel_size") or 1
    pp = get("pipeline_model_parallel_size")
    settings["virtual_pipeline_model_parallel_size"] = vpp if vpp > 1 else None
    settings = chosen(get).adjusted(settings, get)
    if get("multi_latent_attention"):  # its rotary embedding is replaced by ours (models/layers/multi_latent_attention.py)
        scaling, all_dim = rotary_scale(get("rope") or {})
        settings |= {"rope_type": "yarn", "rotary_scaling_factor": scaling, "mscale_all_dim": all_dim}
    if not layout_rules.follows_megatron(get) and get("num_layers") % (pp * vpp):
        settings["pipeline_model_parallel_layout"] = layout_of(
            split_layers(get("num_layers"), pp=pp, vpp=vpp), mtp=get("mtp_num_layers") or 0
        )
    return settings


def has_experts(config: Any, layer: int) -> bool:
    """Whether layer number `layer`, from 0, is a mixture of experts."""
    return layout_rules.has_experts(lambda name: getattr(config, name), layer)


def config_class(get: Callable[[str], Any]) -> Any:
    """TransformerConfig, or its variant for multi-latent attention."""
    return MLATransformerConfig if get("multi_latent_attention") else TransformerConfig
