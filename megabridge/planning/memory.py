"""Traces the device memory of a run before it starts (recipe=plan), without weights or processes; by arithmetic: layouts/memory.py.

Parameters, gradients and optimizer state are counted. Activations are traced: one micro-batch passes through the layers of a rank
on the meta device, and the tensors that autograd saves are added up. Attention counts as its CUDA kernels do, on any device; every
expert gets the same number of tokens. Not counted: workspaces of kernels, fragmentation of the allocator, NCCL's buffers, and the
CUDA context.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megabridge.bridge.auto_bridge import AutoBridge
from megabridge.config import schema
from megabridge.config.schema import Config
from megabridge.conversion.parameters import collect_parameters
from megabridge.conversion.plan import Expansion, PlannedParameter
from megabridge.layouts.memory import ExpectedMemory, in_flight
from megabridge.layouts.work import FP32
from megabridge.mapping import Dims
from megabridge.models.layers.meta_kernels import EvenDispatcher, MetaKernels
from megabridge.models.provider import ModelProvider
from megabridge.parallel.topology import Topology
from megabridge.peft import attach
from megabridge.planning.all_ranks import fake_stage
from megabridge.platform.patches import meta_chunks
from megabridge.platform.patches.half_precision import in_half_precision
from megabridge.training import build, freezing

from megatron.core import tensor_parallel


def expected_memory(
    config: Config, bridge: AutoBridge, provider: ModelProvider, stages: Collection[int] | None = None
) -> list[ExpectedMemory]:
    """Returns the memory by pipeline stage, or of `stages`, for the finalized provider of `config`, with layers of backend=torch.

    It is called without process groups.

    Raises ConfigError, as a run would, for names to train or freeze that match nothing in the model.
    """
    topology = schema.topology(config.parallel)
    _check_names(config, bridge, provider, topology)
    return [_stage(config, bridge, provider, topology, pp) for pp in (range(topology.pp) if stages is None else stages)]


def _check_names(config: Config, bridge: AutoBridge, provider: ModelProvider, topology: Topology) -> None:
    adapters: list[attach.Names] = []
    frozen: list[freezing.Found] = []
    for pp in range(topology.pp if config.peft.name != "none" or config.optimizer.freeze else 0):
        with fake_stage(provider, topology, pp) as chunks:
            if config.peft.name != "none":
                adapters.append(attach.names(chunks, bridge.source.family, bridge.source.native, build.lora(config.peft)))
            else:
                frozen.append(freezing.choose(_entries(bridge, chunks), config.optimizer.freeze)[1])
    if adapters:
        attach.check(build.lora(config.peft), adapters)
    if frozen:
        freezing.check(config.optimizer.freeze, frozen)


def _entries(bridge: AutoBridge, chunks: Sequence[Any]) -> list[PlannedParameter]:
    expansion = Expansion(bridge.source.family, Dims.of(bridge.source.native))
    return [expansion.entry(live.record) for live in collect_parameters(chunks)]


def _stage(config: Config, bridge: AutoBridge, provider: ModelProvider, topology: Topology, pp: int) -> ExpectedMemory:
    with fake_stage(provider, topology, pp) as made:
        chunks: list[Any] = list(made)
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
        _freeze(config, bridge, chunks)
        trained = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad]
        passes = [_trace(config, chunk, topology) for chunk in chunks]
        activations = _in_flight(config, topology, pp, [one.kept for one in passes])
        head, largest = passes[-1].head, 0
        if provider.config.recompute_granularity == "full":
            for chunk in chunks:
                chunk.config.recompute_granularity = None
            passes = [_trace(config, chunk, topology) for chunk in chunks]
            # A layer is recomputed from its saved input after the logits are freed.
            head, largest = passes[-1].head, max(one.largest_layer for one in passes) - _stream(config, provider, topology)
            activations += max(0, largest - head)
        width = provider.config.params_dtype.itemsize
        output = 0
        if chunks[-1].post_process:
            weight = chunks[-1].shared_embedding_or_output_weight()
            output = max(0, head + weight.numel() * width * weight.requires_grad - max(head, largest))
        return ExpectedMemory(
            parameters=sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()) * width,
            gradients=sum(parameter.numel() for parameter in trained) * FP32,
            optimizer=sum(_state(parameter, config, topology, width) for parameter in trained),
            activations=activations,
            output=output,
        )


def _freeze(config: Config, bridge: AutoBridge, chunks: Sequence[Any]) -> None:
    """Freezes all parameters that the config doesn't train."""
    if config.peft.name != "none":
        attach.inject(chunks, bridge.source.family, bridge.source.native, build.lora(config.peft))
    elif config.optimizer.freeze:
        frozen, _ = freezing.choose(_entries(bridge, chunks), config.optimizer.freeze)
        freezing.freeze_parameters(chunks, [live.parameter for live in collect_parameters(chunks) if live.name in frozen])


def _state(parameter: Tensor, config: Config, topology: Topology, width: int) -> int:
    """Bytes of the optimizer's state of a parameter on one of the ranks that share it."""
    numbers = 2 if config.optimizer.name == "adam" else 1
    if width < FP32:
        numbers += 1  # the fp32 master
    ranks = 1
    if config.optimizer.distributed:
        inside = (
            topology.tp * topology.pp if getattr(parameter, "allreduce", True) else topology.expert_tp * topology.ep * topology.pp
        )
        ranks = topology.world_size // inside
    return parameter.numel() * numbers * FP32 // ranks


def _in_flight(config: Config, topology: Topology, pp: int, kept: Sequence[int]) -> int:
    """Bytes saved by the micro-batches between forward and backward pass on a stage."""
    micro_batches = config.recipe.global_batch_size // (config.recipe.micro_batch_size * topology.dp)
    return sum(count * size for count, size in zip(in_flight(topology, pp, micro_batches), kept, strict=True))


@dataclass(frozen=True)
class _Trace:
    """Bytes that autograd saves for a micro-batch in a chunk, without parameters: in total, after the last layer, in one layer."""

    kept: int
    head: int
    largest_layer: int


def _trace(config: Config, chunk: Any, topology: Topology) -> _Trace:
    with _Saved(chunk) as saved:
        marks: list[int] = []
        hooks = [layer.register_forward_hook(lambda *_: marks.append(saved.bytes)) for layer in chunk.decoder.layers]
        hooks.append(chunk.decoder.register_forward_pre_hook(lambda *_: marks.append(saved.bytes)))
        _pass(config, chunk, topology)
        for hook in hooks:
            hook.remove()
    layers = [later - earlier for earlier, later in pairwise(marks)]
    return _Trace(saved.bytes, saved.bytes - marks[-1], max(layers, default=0))


def _stream(config: Config, provider: ModelProvider, topology: Topology) -> int:
    """Bytes of a micro-batch's hidden states between layers."""
    tokens = config.recipe.micro_batch_size * config.recipe.seq_length // topology.cp
    cut = topology.tp if provider.config.sequence_parallel else 1
    width: int = provider.config.hidden_size * provider.config.params_dtype.itemsize
    return tokens // cut * width


def _pass(config: Config, chunk: Any, topology: Topology) -> None:
    wrapped = in_half_precision(chunk.config, chunk) if chunk.config.bf16 or chunk.config.fp16 else chunk
    micro, length = config.recipe.micro_batch_size, config.recipe.seq_length // topology.cp
    tokens = torch.zeros(micro, length, dtype=torch.long, device="meta")
    etp = topology.expert_tp
    meta_chunks.install(chunk, lambda layer: EvenDispatcher(layer.config, experts=layer.num_local_experts, etp=etp))
    if not chunk.pre_process:
        rows = length // topology.tp if chunk.config.sequence_parallel else length
        dtype = chunk.config.params_dtype
        chunk.set_input_tensor(torch.empty(rows, micro, chunk.config.hidden_size, dtype=dtype, device="meta", requires_grad=True))
    settings: Mapping[str, Any] = {"loss_mask": tokens.float()} if chunk.config.mtp_num_layers else {}
    # On a CUDA host megatron-core compiles some functions, which does not work with meta tensors.
    with MetaKernels(), torch.compiler.set_stance("force_eager"):
        wrapped(tokens, tokens, None, labels=tokens, **settings)


class _Saved:
    """Context manager that sums the storages that autograd saves, each once, without those of the chunk's parameters."""

    def __init__(self, chunk: torch.nn.Module) -> None:
        self._chunk = chunk
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def __enter__(self) -> _Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        own = {parameter.untyped_storage()._cdata for parameter in self._chunk.parameters()}
        return sum(storage.nbytes() for key, storage in self._storages.items() if key not in own)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages.setdefault(storage._cdata, storage)  # kept alive, so that no other storage gets its address
        return tensor
