"""Rules of parallel layouts: what a model's sizes allow, how the vocabulary is padded, how batches divide evenly. No torch.

The parent process checks them before anything starts, the provider when it is finalized, the conformance checks for every layout
that they try. `get` returns a setting of the model by its name in TransformerConfig; None is one that is off or not known. Without
a known `num_layers` the rules about sizes aren't checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import isqrt, lcm
from typing import Any, Final

from megabridge.config import optional_packages
from megabridge.config.schema import Config
from megabridge.parallel.topology import Topology

Get = Callable[[str], Any]
_SHOWN: Final = 12
"""Maximum number of sizes that a message suggests."""


def of_run(config: Config, sizes: Mapping[str, Any]) -> Get:
    """Returns `get` of the provider that a run will have for a model with these native settings."""
    parallel = config.parallel
    own = {"sequence_parallel": parallel.sequence_parallel, "pipeline_model_parallel_layout": parallel.layout}
    return {**sizes, **own, **config.model.provider}.get


def backend_of_run(config: Config) -> str | None:
    """Returns the backend that a run will have, or None if only its ranks can know."""
    provider = config.model.provider
    name = str(provider.get("backend", config.backend.name))
    if name != "auto":
        return name
    is_torch = config.platform == "cpu" or not optional_packages.is_installed("transformer_engine")
    return "torch" if is_torch or (config.peft.name != "none" and "backend" not in provider) else None


def model_problems(get: Get, topology: Topology, *, backend: str | None) -> list[str]:
    """Returns a sentence for each broken rule between model, backend (None: not known) and layout. dp doesn't matter."""
    problems = []
    if get("num_layers") is not None:
        problems += [*_tensor_problems(get, topology.tp), *_expert_problems(get, topology), *_stage_problems(get, topology)]
    return [*problems, *_sequence_parallel_problems(get, topology), *_backend_problems(get, topology, backend)]


def divisors(number: int) -> list[int]:
    """Returns the divisors of `number`, in ascending order."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def one_of(sizes: list[int]) -> str:
    """Returns sizes as text for a message, at most _SHOWN."""
    found = [str(size) for size in sizes]
    return ", ".join(found if len(found) <= _SHOWN else [*found[: _SHOWN - 1], "..."])


def allowed_tp(get: Get) -> list[int]:
    """Returns the tensor parallel sizes that break no rule of the model's sizes."""
    return [tp for tp in divisors(get("num_attention_heads")) if not any(_broken_by_tp(get, tp))]


def _tensor_problems(get: Get, tp: int) -> list[str]:
    return [f"parallel.tp={tp} must {rule}; use one of {one_of(allowed_tp(get))}." for rule in _broken_by_tp(get, tp)]


def _broken_by_tp(get: Get, tp: int) -> Iterator[str]:
    """Yields the rules that tp breaks, to follow the word "must". KV heads are cut, or shared by several ranks."""
    heads = get("num_attention_heads")
    groups = get("num_query_groups") or heads
    channels = get("kv_channels") or get("hidden_size") // heads
    widths = {"ffn_hidden_size": ffn_width(get), "moe_shared_expert_intermediate_size": get("moe_shared_expert_intermediate_size")}
    if heads % tp:
        yield f"divide num_attention_heads={heads}"
    if groups % tp and tp % groups:
        yield f"divide num_query_groups={groups}, or be a multiple of it"
    if groups < tp and (heads + 2 * groups) * channels % tp:
        yield f"divide the query, key and value rows, ({heads} + 2 x {groups}) x {channels}"
    yield from (f"divide {name}={width}" for name, width in widths.items() if width is not None and width % tp)


def ffn_width(get: Get) -> int:
    """Returns the intermediate size of a layer's MLP: megatron-core's default is four times the hidden size."""
    return int(get("ffn_hidden_size") or 4 * get("hidden_size"))


def _expert_problems(get: Get, topology: Topology) -> list[str]:
    ep, etp, experts = topology.ep, topology.expert_tp, get("num_moe_experts")
    if experts is None:
        sizes = {"ep": ep, "etp": 1 if topology.etp is None else etp}
        return [f"parallel.{name}={size} needs a model with experts; leave it out." for name, size in sizes.items() if size > 1]
    problems = []
    if experts % ep:
        problems.append(f"parallel.ep={ep} must divide num_moe_experts={experts}; use one of {one_of(divisors(experts))}.")
    problems += expert_cut_problems(etp, get("moe_ffn_hidden_size") or ffn_width(get), has_biases=bool(get("add_mlp_bias")))
    if topology.tp > 1 and not get("sequence_parallel"):
        problems.append(f"parallel.tp={topology.tp} needs parallel.sequence_parallel=true for a model with experts; set it.")
    return problems


def expert_cut_problems(etp: int, width: int, *, has_biases: bool) -> list[str]:
    """Returns a sentence for each reason why experts of this width can't be cut into `etp` parts."""
    problems = []
    if width % etp:
        problems.append(f"parallel.etp={etp} must divide moe_ffn_hidden_size={width}; use one of {one_of(divisors(width))}.")
    if etp > 1 and has_biases:
        problems.append(f"parallel.etp={etp} must be 1 for experts with biases; set it so.")
    return problems


def follows_megatron(get: Get) -> bool:
    """Whether the user sets how layers are divided between stages; megatron-core then checks it."""
    return (
        get("pipeline_model_parallel_layout") is not None
        or get("num_layers_in_first_pipeline_stage") is not None
        or get("num_layers_in_last_pipeline_stage") is not None
        or bool(get("account_for_embedding_in_pipeline_split"))
        or bool(get("account_for_loss_in_pipeline_split"))
    )


def _stage_problems(get: Get, topology: Topology) -> list[str]:
    return [] if follows_megatron(get) else stage_problems(get("num_layers"), pp=topology.pp, vpp=topology.vpp)


def stage_problems(num_layers: int, *, pp: int, vpp: int) -> list[str]:
    """Checks that no chunk is empty; the first and last need no layers, as they hold the embedding and the output layer."""
    if pp * vpp - 2 <= num_layers:
        return []
    return [
        f"parallel.pp x parallel.vpp = {pp} x {vpp} leaves chunks without layers for num_layers={num_layers}; "
        f"use at most {num_layers + 2} chunks."
    ]


def _sequence_parallel_problems(get: Get, topology: Topology) -> list[str]:
    if not get("sequence_parallel"):
        return []
    if topology.tp == 1:
        return ["parallel.sequence_parallel=true needs parallel.tp > 1; set parallel.tp=2 or leave it false."]
    length = get("seq_length")
    return [] if length is None else sequence_problems("seq_length", length, topology, sequence_parallel=True)


def sequence_multiple(topology: Topology, *, sequence_parallel: bool) -> int:
    """What the length of a sequence must be a multiple of, to be cut evenly."""
    return lcm(*_sequence_parts(topology, sequence_parallel))


def _sequence_parts(topology: Topology, sequence_parallel: bool) -> tuple[int, int]:
    """(parts of tensor and context parallelism, chunks of context parallelism, of which a rank takes two)."""
    return topology.tp * topology.cp if sequence_parallel else 1, 2 * topology.cp if topology.cp > 1 else 1


def sequence_problems(name: str, length: int, topology: Topology, *, sequence_parallel: bool) -> list[str]:
    """Checks that sequences of `length` tokens, the setting `name`, are cut evenly."""
    parts, chunks = _sequence_parts(topology, sequence_parallel)
    needed = lcm(parts, chunks)
    said = [f"tp x cp = {parts} under parallel.sequence_parallel"] * bool(length % parts)
    said += [f"2 x cp = {chunks}"] * bool(length % chunks)
    return [f"{name}={length} must be a multiple of {each}; use {length // needed * needed or needed}." for each in said]


def _backend_problems(get: Get, topology: Topology, backend: str | None) -> list[str]:
    problems = []
    if backend == "local" and get("sequence_parallel"):
        problems.append("backend=local has no sequence parallelism (megatron-core's torch norms); use backend=torch.")
    if backend in ("torch", "local") and topology.cp > 1:
        problems.append(f"parallel.cp={topology.cp} needs backend=te, not {backend}; set it to 1.")
    return problems


def batch_problems(global_batch_size: int, micro_batch_size: int, dp: int) -> list[str]:
    """Checks that a step's sequences make whole micro-batches, the same number on every data-parallel rank."""
    at_once = micro_batch_size * dp
    if global_batch_size >= at_once and global_batch_size % at_once == 0:
        return []
    rule = f"must be a multiple of recipe.micro_batch_size x dp = {micro_batch_size} x {dp}"
    return [
        f"recipe.global_batch_size={global_batch_size} {rule}; "
        f"use recipe.global_batch_size={max(1, global_batch_size // at_once) * at_once} or another multiple of {at_once}."
    ]


def step_problems(config: Config, topology: Topology) -> list[str]:
    """Returns a sentence for each reason why a run's steps don't divide into equal batches; all sizes are at least 1."""
    recipe = config.recipe
    name, is_cut = "recipe.seq_length", config.parallel.sequence_parallel
    problems = sequence_problems(name, recipe.seq_length, topology, sequence_parallel=is_cut)
    if uneven := batch_problems(recipe.global_batch_size, recipe.micro_batch_size, topology.dp):
        return problems + uneven
    at_once = recipe.micro_batch_size * topology.dp
    count = recipe.global_batch_size // at_once
    group = config.model.provider.get("microbatch_group_size_per_vp_stage")
    if topology.vpp > 1 and group is None and count % topology.pp:
        # megatron-core's interleaved schedule (pipeline_parallel/schedules.py) refuses a last group of a different size.
        problems.append(
            f"parallel.vpp={topology.vpp} needs micro-batches per step ({count}) that are a multiple of parallel.pp={topology.pp}; "
            f"use recipe.global_batch_size={at_once * topology.pp * (count // topology.pp + 1)} or another multiple of "
            f"{at_once * topology.pp}."
        )
    return problems


def padded_vocab_size(get: Get, tp: int) -> int:
    """Returns vocab_size, padded to a multiple of make_vocab_size_divisible_by x tp."""
    multiple = int(get("make_vocab_size_divisible_by")) * tp
    return -(-int(get("vocab_size")) // multiple) * multiple


def has_experts(get: Get, layer: int) -> bool:
    """Whether layer number `layer`, from 0, is a mixture of experts, as megatron-core reads moe_layer_freq."""
    if get("num_moe_experts") is None:
        return False
    pattern = get("moe_layer_freq")
    if pattern is None:
        return True
    return layer % pattern == 0 if isinstance(pattern, int) else bool(pattern[layer])
