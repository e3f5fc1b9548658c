"""Estimates of the memory that a rank of a layout needs, by arithmetic: hundreds of layouts in a second. No torch.

megabridge.planning.memory traces the same for one layout. Activations are those that the layers of backend=torch save for the
backward pass. With adapters every linear counts as having one, and `optimizer.freeze` is ignored, so that an estimate is rather too
high than too low.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.layouts.shape import Matrix
from megabridge.layouts.work import FP32, Work
from megabridge.parallel.topology import Topology


@dataclass(frozen=True)
class ExpectedMemory:
    """Bytes on the first rank of a pipeline stage."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Saved for all backward passes that are pending at the same time, plus with recomputation those of one whole layer."""
    output: int
    """The gradient of the output layer's weight, which is computed while all activations are still kept."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.output


@dataclass(frozen=True)
class Held:
    """Parameters on a rank: dense ones and experts, and how many of each are trained."""

    dense: int
    experts: int
    trained_dense: int
    trained_experts: int


def in_flight(topology: Topology, stage: int, micro_batches: int) -> list[int]:
    """Returns, by chunk of a stage, its micro-batches between forward and backward pass (pipeline_parallel/schedules.py)."""
    pp, vpp = topology.pp, topology.vpp
    if vpp == 1:
        return [min(micro_batches, pp - stage)]
    passes = min((pp - stage - 1) * 2 + (vpp - 1) * pp + 1, micro_batches * vpp)
    rounds, rest = divmod(passes, pp * vpp)  # chunks take turns, pp micro-batches each
    return [rounds * pp + min(pp, max(0, rest - chunk * pp)) for chunk in range(vpp)]


def expected(work: Work, layout: ParallelLayout) -> dict[int, ExpectedMemory]:
    """Returns the estimate by stage, for the stages among which the heaviest is."""
    topology = layout.topology
    dealt = work.dealt(topology)
    layers = tuple(_layer(work, layout, is_mixture) if is_there else 0 for is_mixture, is_there in enumerate(_kinds_there(work)))
    return {stage: _stage(work, layout, stage, dealt.chunks[stage], layers) for stage in dealt.heaviest}


def _kinds_there(work: Work) -> tuple[bool, bool]:
    """Returns whether the model has dense layers, and whether it has mixtures."""
    return not work.shape.experts or any(not kind.is_mixture for kind in work.shape.kinds), bool(work.shape.experts)


def held(work: Work, topology: Topology, stage: int) -> Held:
    """Returns the parameters on a rank of a stage."""
    shape, tp, rank = work.shape, topology.tp, work.rank
    chunks = work.dealt(topology).chunks[stage]
    plain, mixtures = sum(one for one, _ in chunks), sum(mixed for _, mixed in chunks)
    norms = 2 * shape.hidden
    dense = plain * (work.local("dense", tp) + norms) if plain else 0
    experts = 0
    if mixtures:
        dense += mixtures * (work.local("mixture", tp) + norms)
        experts = mixtures * (shape.experts // topology.ep) * work.local("expert", topology.expert_tp)
    table = shape.padded_vocabulary(tp) // tp * shape.hidden
    is_last = stage == topology.pp - 1
    tables = int(stage == 0) + int(is_last and not (shape.is_tied and topology.pp == 1))
    if is_last and shape.mtp and stage != 0:
        tables += not shape.is_tied  # multi-token prediction embeds the tokens again
    dense += tables * table + (shape.positions * shape.hidden if stage == 0 else 0) + (shape.hidden if is_last else 0)
    if is_last:
        dense += shape.mtp * (2 * shape.hidden**2 // tp + 3 * shape.hidden)
    if not rank:
        return Held(dense, experts, dense, experts)
    adapters = plain * _adapters(shape.matrices[False], rank) + mixtures * _adapters(shape.matrices[True], rank)
    return Held(dense, experts, adapters, mixtures * (shape.experts // topology.ep) * _adapters(shape.expert, rank))


def _adapters(matrices: Iterable[Matrix], rank: int) -> int:
    """Returns the parameters of adapters beside these on a rank, taken as whole although tensor parallelism cuts one of a pair."""
    return sum(rank * (matrix.parts * matrix.columns + matrix.rows) for matrix in matrices if matrix.parts)


def state_ranks(work: Work, topology: Topology) -> tuple[int, int]:
    """Returns how many ranks share the optimizer's state of a dense parameter, and of an expert's."""
    if not work.is_distributed:
        return 1, 1
    return topology.dp * topology.cp, topology.stage_size // (topology.expert_tp * topology.ep)


def _stage(
    work: Work, layout: ParallelLayout, stage: int, chunks: Sequence[tuple[int, int]], layers: tuple[int, ...]
) -> ExpectedMemory:
    """`chunks` are (dense layers, mixtures) of the stage's, `layers` the bytes that one of either kind keeps of a micro-batch."""
    topology, own = layout.topology, held(work, layout.topology, stage)
    numbers = work.moments + (work.width < FP32)
    of_dense, of_experts = state_ranks(work, topology)
    counts = in_flight(topology, stage, work.micro_batches(topology))
    is_last = stage == topology.pp - 1
    head = _head(work, layout) if is_last else 0
    stream = _stream(work, layout)
    per_layer = (stream, stream) if work.recomputes else layers
    activations = counts[-1] * head
    for (plain, mixtures), count in zip(chunks, counts, strict=True):
        activations += count * (plain * per_layer[0] + mixtures * per_layer[1])
    whole = 0
    if work.recomputes:
        whole = max(max(layers[0] * bool(plain), layers[1] * bool(mixtures)) for plain, mixtures in chunks) - stream
        activations += max(0, whole - head)
    output = 0
    if is_last and not work.rank:
        weight = work.shape.padded_vocabulary(topology.tp) // topology.tp * work.shape.hidden * work.width
        output = max(0, head + weight - max(head, whole))
    return ExpectedMemory(
        parameters=(own.dense + own.experts + (own.trained_dense + own.trained_experts) * bool(work.rank)) * work.width,
        gradients=(own.trained_dense + own.trained_experts) * FP32,
        optimizer=numbers * FP32 * (own.trained_dense // of_dense + own.trained_experts // of_experts),
        activations=activations,
        output=output,
    )


def _stream(work: Work, layout: ParallelLayout) -> int:
    """Returns the bytes of a micro-batch's hidden states between layers."""
    return cut_tokens(work, layout) * work.shape.hidden * work.width


def cut_tokens(work: Work, layout: ParallelLayout) -> int:
    """Returns the tokens of a micro-batch on a rank where they are cut along the sequence."""
    return work.tokens(layout.topology) // (layout.topology.tp if layout.sequence_parallel else 1)


def _layer(work: Work, layout: ParallelLayout, is_mixture: int) -> int:
    """Returns the bytes that autograd saves for a micro-batch in a layer."""
    shape, tp, width = work.shape, layout.topology.tp, work.width
    whole, cut = work.tokens(layout.topology), cut_tokens(work, layout)
    # Norms keep their input and a factor for each token, and the linears after two of them theirs.
    kept = cut * ((shape.norms + 2) * shape.hidden * width + shape.norms * FP32) + _attention(work, layout)
    up = 2 if shape.is_gated else 1
    if not is_mixture:
        return int(kept + whole * shape.mlp[1].columns / tp * (up + shape.activations) * width)
    if shape.shared:
        kept += whole * shape.shared[1].columns / tp * (up + shape.activations) * width
    # Of the tokens that come to the experts of a rank: theirs, what comes out, and what is made between the matrices.
    etp = layout.topology.expert_tp
    widths = shape.expert[1].columns / etp * (up + (_EXPERT_ACTIVATIONS if shape.is_gated else 1))
    kept += cut * shape.topk * etp * (2 * shape.hidden + widths) * width
    # The router sees its input in float32, and keeps scores and their share for each expert.
    return int(kept + cut * (shape.hidden + 2 * shape.experts) * FP32)


_EXPERT_ACTIVATIONS: Final = 4
"""Tensors of an expert's width that its gated activation keeps beside its input, in several kernels and with the token's weight."""


def _attention(work: Work, layout: ParallelLayout) -> float:
    """Returns the bytes saved of queries, keys, values, what attention makes of them, and the logarithm of its sum."""
    shape, tp, width = work.shape, layout.topology.tp, work.width
    whole, cut = work.tokens(layout.topology), cut_tokens(work, layout)
    heads, groups = shape.heads / tp, max(shape.groups / tp, 1)
    turned, out = (heads + groups) * shape.key_width, heads * shape.value_width
    if any(shape.latent):
        before, after = shape.latent
        return whole * ((turned + groups * shape.value_width + out + before) * width + heads * FP32) + cut * after * width
    # Values are a part of the linear's output, which so is kept in whole; norms of queries keep these once more.
    fused = (heads + 2 * groups) * shape.key_width
    if shape.groups < tp:  # ranks that share a group gather the linear's output of all
        fused = (shape.heads + 2 * shape.groups) * shape.key_width
    normed = heads * shape.key_width if shape.norms_queries and groups > 1 else 0
    return whole * ((fused + turned + out + normed) * width + heads * FP32)


def _head(work: Work, layout: ParallelLayout) -> int:
    """Returns the bytes saved after the last layer: the norm's input and output, and the logits, overwritten by their gradient."""
    shape, topology = work.shape, layout.topology
    logits = work.tokens(topology) * shape.padded_vocabulary(topology.tp) // topology.tp * work.width
    logits *= 2 if shape.caps_logits else 1
    return int((2 * _stream(work, layout) + logits) * (1 + shape.mtp))
