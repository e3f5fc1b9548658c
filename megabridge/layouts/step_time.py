"""Estimates of the time of an optimizer step, by the model that docs/scale.md describes. No torch.

Constants say whether they are fitted to what docs/performance.md measured on one H100, or assumed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from megabridge.layouts import links, memory
from megabridge.layouts.devices import Machine
from megabridge.layouts.links import Group
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.layouts.shape import Kind, Matrix, seen
from megabridge.layouts.work import FP32, Work

MATRIX_SHARE: Final = 0.81
"""Share of a device's matrix FLOP/s that large matrix products reach: 801 of 989 TFLOP/s on the measured H100."""
MATRIX_SIDE: Final = 128.0
"""A product of m x k and k x n takes 1 + MATRIX_SIDE (1/m + 1/n + 1/k) times as long as that: fitted."""
ATTENTION_SHARE: Final = 0.88
"""Share of the matrix FLOP/s that attention with very wide heads would reach; fitted together with:"""
ATTENTION_WIDTH: Final = 123.0
"""Heads of width w reach w / (w + ATTENTION_WIDTH) of it. Fitted at 64; that 128 reaches half as much again is assumed."""
ELEMENT_SHARE: Final = 0.51
"""Share of the memory bandwidth that element-wise kernels reach, for the bytes counted here: fitted."""
OPTIMIZER_SHARE: Final = 0.74
"""Share of the memory bandwidth that the optimizer's kernels reach: fitted."""
LAUNCH_SECONDS: Final = 0.27e-3
"""Idle time between kernels, per layer and micro-batch: fitted."""
ADAPTER_PASSES: Final = 4.3
"""Passes over the input and output of a linear with an adapter: fitted."""
ROUTING_PASSES: Final = 58.0
"""Passes over the hidden states of routed tokens, besides the products: fitted to the one mixture that was measured. It stands for
sorting, copying and host synchronisation together."""
LOSS_PASSES: Final = 3.0
"""Passes over the logits: read, and read and written for their gradient."""
HIDDEN_SHARE: Final = 0.9
"""Share of a data-parallel collective that can be overlapped at most; the last bucket can't. Assumed."""
INTERLEAVED_SHARE: Final = 0.5
"""Share of the time of messages between stages that the interleaved schedule doesn't hide. Assumed."""
_NORM_ELEMENTS: Final = 20
"""Elements of the hidden width that norms and residual sums of a layer read or write, forward and backward."""
_FORWARD: Final = 0.4
"""Share of a layer's element-wise bytes in its forward pass."""


@dataclass(frozen=True)
class Cost:
    """Seconds on a rank for one micro-batch, forward and backward together: computing, and waiting for others by axis."""

    compute: float = 0.0
    tensor: float = 0.0
    expert: float = 0.0
    context: float = 0.0

    def times(self, count: float) -> Cost:
        return Cost(self.compute * count, self.tensor * count, self.expert * count, self.context * count)

    def plus(self, other: Cost) -> Cost:
        return Cost(
            self.compute + other.compute,
            self.tensor + other.tensor,
            self.expert + other.expert,
            self.context + other.context,
        )

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.expert + self.context


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. The parts add up to the whole; the first five are of the slowest stage, over its micro-batches."""

    compute: float
    tensor: float
    expert: float
    context: float
    pipeline: float
    """Waiting for messages of other stages."""
    bubble: float
    """While the pipeline fills and drains."""
    data: float
    """Summing gradients and gathering parameters, as far as nothing hides it."""
    optimizer: float

    @property
    def total(self) -> float:
        parts = (self.compute, self.tensor, self.expert, self.context, self.pipeline, self.bubble, self.data, self.optimizer)
        return sum(parts)


@dataclass(frozen=True)
class Model:
    """The step times of one work on one machine."""

    work: Work
    machine: Machine
    _layers: dict[tuple[object, ...], Cost] = field(default_factory=dict, repr=False, compare=False)

    @property
    def flops(self) -> float:
        """FLOP/s of the device's dense matrix products, in the precision of the work."""
        device = self.machine.device
        return (device.tflops_32bit if self.work.width == FP32 else device.tflops_16bit) * 1e12

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth of a device, in bytes a second."""
        return self.machine.device.memory_gbs * 1e9

    def product(self, m: float, n: float, k: float) -> float:
        """Returns the seconds of one product of m x k and k x n."""
        share = MATRIX_SHARE / (1 + MATRIX_SIDE * (1 / m + 1 / n + 1 / k))
        moved = self.work.width * (m * k + k * n + m * n)
        return max(2.0 * m * n * k / (self.flops * share), moved / self.bandwidth)

    def elements(self, count: float) -> float:
        """Returns the seconds of element-wise kernels that read or write `count` elements together."""
        return count * self.work.width / (self.bandwidth * ELEMENT_SHARE)

    def step(self, layout: ParallelLayout) -> StepTime:
        """Returns the expected time of a step in a legal layout."""
        topology, work = layout.topology, self.work
        count = work.micro_batches(topology)
        middle = {kinds: self._layers_of(layout, kinds) for kinds in set(work.dealt(topology).kinds)}
        stages = [self._ends(layout, stage, middle[kinds]) for stage, kinds in enumerate(work.dealt(topology).kinds)]
        slowest = max(stages, key=lambda cost: cost.total)
        sends = self._messages(layout)
        waits = sum(cost.total for cost in stages) - slowest.total + sends * (topology.pp - 1)
        return StepTime(
            compute=slowest.compute * count,
            tensor=slowest.tensor * count,
            expert=slowest.expert * count,
            context=slowest.context * count,
            pipeline=sends * count,
            bubble=waits / topology.vpp,
            data=self._data(layout, slowest.compute),
            optimizer=self._optimizer(layout),
        )

    # ------------------------------------------------------------------ a stage

    def _layers_of(self, layout: ParallelLayout, kinds: tuple[tuple[Kind, int], ...]) -> Cost:
        cost = Cost()
        for kind, number in kinds:
            cost = cost.plus(self._layer(layout, kind).times(number))
        return cost

    def _ends(self, layout: ParallelLayout, stage: int, cost: Cost) -> Cost:
        """Returns the cost of a stage, whose layers cost `cost`: the first embeds, the last has the output layer."""
        topology = layout.topology
        if stage == 0:
            cost = cost.plus(Cost(compute=self.elements(4.0 * self.work.tokens(topology) * self.work.shape.hidden)))
        if stage == topology.pp - 1:
            cost = cost.plus(self._head(layout))
        return cost

    def _layer(self, layout: ParallelLayout, kind: Kind) -> Cost:
        topology = layout.topology
        key = (topology.tp, topology.cp, topology.ep, topology.expert_tp, layout.sequence_parallel, kind)
        if key not in self._layers:
            again = 1.0 if self.work.recomputes else 0.0
            products = self._products(layout, kind) + self._attention(layout, kind)
            # Forward is one of three equal parts, of two where the weights are frozen.
            compute = products * (1 + again / (2 if self.work.rank else 3))
            compute += self._elements(layout, kind) * (1 + again * _FORWARD) + LAUNCH_SECONDS * (1 + again / 3)
            self._layers[key] = Cost(
                compute,
                self._tensor(layout, kind, products, again),
                self._expert(layout, kind, again),
                self._context(layout, again),
            )
        return self._layers[key]

    def _passes(self) -> int:
        """Returns the number of products per weight: forward, the gradient of its input, and, where it is trained, its own."""
        return 2 if self.work.rank else 3

    def _products(self, layout: ParallelLayout, kind: Kind) -> float:
        work, topology = self.work, layout.topology
        whole, cut = work.tokens(topology), memory.cut_tokens(work, layout)
        seconds = 0.0
        for matrix in work.shape.matrices[kind.is_mixture]:
            rows, columns = matrix.local(topology.tp)
            seconds += self._passes() * self.product(cut if matrix.cut == "none" else whole, rows, columns)
        if kind.is_mixture:
            here = work.shape.experts // topology.ep
            each = max(cut * work.shape.topk * topology.expert_tp / here, 1.0)
            for matrix in work.shape.expert:
                rows, columns = matrix.local(topology.expert_tp)
                seconds += here * self._passes() * self.product(each, rows, columns)
                if not work.rank:  # gradients of experts are added to the float32 ones apart from the product
                    seconds += here * rows * columns * (2 * FP32 + work.width) / (self.bandwidth * OPTIMIZER_SHARE)
        return seconds

    def _attention(self, layout: ParallelLayout, kind: Kind) -> float:
        work, shape = self.work, self.work.shape
        width = shape.key_width + shape.value_width
        tokens = work.tokens(layout.topology)
        heads = shape.heads / layout.topology.tp
        operations = 3 * 2.0 * tokens * heads * width * seen(work.seq_length, kind.window)
        share = ATTENTION_SHARE * width / (width + 2 * ATTENTION_WIDTH)
        return operations / (self.flops * share)

    def _elements(self, layout: ParallelLayout, kind: Kind) -> float:
        work, shape, topology = self.work, self.work.shape, layout.topology
        whole, cut = work.tokens(topology), memory.cut_tokens(work, layout)
        turned = (shape.heads + shape.groups) * shape.key_width + shape.groups * shape.value_width
        count = cut * _NORM_ELEMENTS * shape.hidden + whole * 4.0 * turned / topology.tp
        of_unit = 8 if shape.is_gated else 5
        if kind.is_mixture:
            routed = cut * shape.topk * topology.expert_tp
            count += routed * (ROUTING_PASSES * shape.hidden + of_unit * shape.expert[1].columns / topology.expert_tp)
            count += whole * sum(of_unit * shape.shared[1].columns / topology.tp for _ in shape.shared[:1])
        else:
            count += whole * of_unit * shape.mlp[1].columns / topology.tp
        if work.rank:
            count += whole * sum(self._adapted(matrix, topology.tp) for matrix in shape.matrices[kind.is_mixture])
            if kind.is_mixture:
                count += cut * shape.topk * sum(self._adapted(matrix, 1) for matrix in shape.expert)
        return self.elements(count)

    def _adapted(self, matrix: Matrix, tp: int) -> float:
        rows, columns = matrix.local(tp)
        return ADAPTER_PASSES * (rows + matrix.parts * columns) if matrix.parts else 0.0

    def _tensor(self, layout: ParallelLayout, kind: Kind, products: float, again: float) -> float:
        """Returns the exposed seconds of all-gathers and reduce-scatters around attention and MLP, or of all-reduces.

        Of the backward pass's those that megatron-core runs beside a product wait only where they take longer.
        """
        topology, shape = layout.topology, self.work.shape
        if topology.tp == 1:
            return 0.0
        halves = 1 if kind.is_mixture and not shape.shared else 2
        once = self._gather(layout)
        if shape.groups < topology.tp:  # ranks that share a group of keys gather the linear's output of all
            width = (shape.heads + 2 * shape.groups) * shape.key_width
            bytes_ = self.work.tokens(topology) * width * self.work.width
            shared = links.ring(bytes_, Group(topology.tp, 1), self.machine.device) * (2 + again)
        else:
            shared = 0.0
        forward, behind = 2 * halves * once, 2 * halves * once
        exposed = forward * (1 + again) + (halves * once if layout.sequence_parallel else 0.0)
        return shared + exposed + max(0.0, behind - products * (self._passes() - 1) / self._passes())

    def _gather(self, layout: ParallelLayout) -> float:
        """Returns the seconds of gathering a micro-batch's hidden states over the tensor-parallel ranks."""
        work, topology = self.work, layout.topology
        bytes_ = work.tokens(topology) * work.shape.hidden * work.width
        return links.ring(bytes_, Group(topology.tp, 1), self.machine.device)

    def _expert(self, layout: ParallelLayout, kind: Kind, again: float) -> float:
        """Returns the seconds of dispatching tokens to experts and combining them, forward and backward."""
        if not kind.is_mixture:
            return 0.0
        work, topology, device = self.work, layout.topology, self.machine.device
        bytes_ = memory.cut_tokens(work, layout) * work.shape.topk * work.shape.hidden * work.width
        once = links.all_to_all(bytes_, Group(topology.ep, topology.expert_tp), device)
        once += links.ring(bytes_ * topology.expert_tp, Group(topology.expert_tp, 1), device)
        return once * (4 + 2 * again)

    def _context(self, layout: ParallelLayout, again: float) -> float:
        """Returns the seconds of passing keys, values and their gradients round the context-parallel ranks."""
        work, topology = self.work, layout.topology
        width = work.shape.groups * (work.shape.key_width + work.shape.value_width) / topology.tp
        bytes_ = work.tokens(topology) * topology.cp * width * work.width
        return links.ring(bytes_, Group(topology.cp, topology.tp), self.machine.device) * (3 + again)

    def _head(self, layout: ParallelLayout) -> Cost:
        """Returns the cost of the output layer and the loss; once more for every layer of multi-token prediction."""
        work, topology = self.work, layout.topology
        rows = work.shape.padded_vocabulary(topology.tp) // topology.tp
        tokens, hidden = work.tokens(topology), work.shape.hidden
        compute = self._passes() * self.product(tokens, rows, hidden) + self.elements(LOSS_PASSES * tokens * rows)
        gathers = 2 * self._gather(layout) if topology.tp > 1 else 0.0
        return Cost(compute, gathers).times(1 + work.shape.mtp)

    # ------------------------------------------------------------------ between stages and replicas

    def _messages(self, layout: ParallelLayout) -> float:
        """Returns the seconds that a stage waits for messages, for each micro-batch."""
        topology, work = layout.topology, self.work
        if topology.pp == 1:
            return 0.0
        bytes_ = memory.cut_tokens(work, layout) * work.shape.hidden * work.width
        once = links.send(bytes_, distance=topology.stage_size, world=topology.world_size, device=self.machine.device)
        return 2 * once * topology.vpp * (INTERLEAVED_SHARE if topology.vpp > 1 else 1.0)

    def _data(self, layout: ParallelLayout, computing: float) -> float:
        """Returns the exposed seconds of reducing gradients and gathering parameters.

        `computing` are the seconds that a stage computes for one micro-batch, which collectives can overlap.
        """
        work, topology, device = self.work, layout.topology, self.machine.device
        own = memory.held(work, topology, 0)
        apart = topology.expert_tp * topology.ep
        groups = (
            (own.trained_dense, Group(topology.dp * topology.cp, topology.tp)),
            (own.trained_experts, Group(topology.stage_size // apart, apart)),
        )
        reduces = sum(links.ring(count * FP32, group, device) for count, group in groups)
        if work.is_distributed:
            gathers = sum(links.ring(count * work.width, group, device) for count, group in groups)
        else:
            reduces, gathers = 2 * reduces, 0.0
        tied = 0.0
        if work.shape.is_tied and topology.pp > 1 and not work.rank:
            table = work.shape.padded_vocabulary(topology.tp) // topology.tp * work.shape.hidden
            tied = 2 * links.ring(table * FP32, Group(2, topology.stage_size), device)
        backward = computing * (self._passes() - 1) / self._passes()
        return (
            _exposed(reduces, backward, is_hidden=work.overlaps_reduce)
            + _exposed(gathers, computing - backward, is_hidden=work.overlaps_gather)
            + tied
        )

    def _optimizer(self, layout: ParallelLayout) -> float:
        """Returns the seconds of the optimizer on the stage with most parameters."""
        work, topology = self.work, layout.topology
        of_dense, of_experts = memory.state_ranks(work, topology)
        most = 0.0
        for stage in work.dealt(topology).heaviest:
            own = memory.held(work, topology, stage)
            trained, mine = own.trained_dense + own.trained_experts, own.trained_dense / of_dense + own.trained_experts / of_experts
            numbers = FP32 + 2 * FP32 * (work.moments + 1) + (work.width if work.width < FP32 else 0)
            most = max(most, mine * numbers + trained * 2 * FP32)  # the norm reads gradients, and they are set to 0
        return most / (self.bandwidth * OPTIMIZER_SHARE)


def _exposed(seconds: float, beside: float, *, is_hidden: bool) -> float:
    return max(seconds - beside, seconds * (1 - HIDDEN_SHARE)) if is_hidden else seconds
