"""Search of the layouts that a run allows on a number of devices and that fit, the fastest first. No torch.

Which are allowed is asked of megabridge.config.layout_rules alone. Sequence parallelism is on wherever it may be with tp above 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, NoReturn

from megabridge.config import layout_rules
from megabridge.config.schema import Config, ParallelConfig
from megabridge.errors import ConfigError
from megabridge.layouts import memory, step_time
from megabridge.layouts.devices import Machine
from megabridge.layouts.memory import ExpectedMemory
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.layouts.step_time import StepTime
from megabridge.layouts.work import Work, work_of
from megabridge.parallel.topology import SETTINGS, Topology

GIB: Final = 2**30
_NAMES: Final = (*SETTINGS, "dp", "sequence_parallel")


@dataclass(frozen=True)
class Candidate:
    """A layout with what it is expected to need and take. `memory` is of the stage that needs most."""

    layout: ParallelLayout
    memory: ExpectedMemory
    stage: int
    time: StepTime
    tokens_per_second: float
    """Tokens per second of all devices together."""
    mfu: float

    @property
    def gib(self) -> float:
        return self.memory.total / GIB

    @property
    def bubble(self) -> float:
        """Share of a step."""
        return self.time.bubble / self.time.total

    def content(self) -> dict[str, object]:
        """Returns the candidate as JSON, in bytes and seconds."""
        return {
            "layout": str(self.layout),
            "sizes": self.layout.topology.sizes(),
            "sequence_parallel": self.layout.sequence_parallel,
            "memory": {**asdict(self.memory), "total": self.memory.total, "stage": self.stage},
            "seconds": {**asdict(self.time), "total": self.time.total},
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
        }


@dataclass(frozen=True)
class Found:
    """`fitting` has the fastest first, `closest` is that of the `too_large` others which needs least. `room`: bytes of a device."""

    machine: Machine
    work: Work
    room: float
    fitting: tuple[Candidate, ...]
    too_large: int
    closest: Candidate | None

    @property
    def best(self) -> Candidate:
        """Returns the fastest. Raises ConfigError, naming the closest and what it lacks, where nothing fits."""
        if self.fitting:
            return self.fitting[0]
        assert self.closest is not None  # `search` raises where there is no legal layout
        return self.fail(self.closest, self.too_large)

    def fail(self, closest: Candidate, count: int) -> NoReturn:
        """Raises ConfigError for `count` layouts that need too much, of which `closest` needs least."""
        parts = {name: value for name, value in asdict(closest.memory).items() if value}
        largest = max(parts, key=lambda name: parts[name])
        remedies = ["more devices", "peft=lora"]
        if not self.work.is_distributed:
            remedies.insert(0, "optimizer.distributed=true")
        if largest in _PASSING:
            remedies = ["a smaller recipe.micro_batch_size", *["recomputation"] * (not self.work.recomputes), *remedies]
        device = self.machine.device
        raise ConfigError(
            f"none of {count} layouts of {self.machine.count} x {device.name} fits: the closest, {closest.layout}, needs "
            f"{closest.gib:.2f} GiB of a device, most of it {largest}, where {self.room / GIB:.2f} may be filled (plan.usable of "
            f"{device.memory_gib:.2f}), so {(closest.memory.total - self.room) / GIB:.2f} GiB are missing; use "
            f"{', '.join(remedies[:-1])} or {remedies[-1]}."
        )


_PASSING: Final = ("activations", "output")
"""Memory that grows with a micro-batch."""


def fixed_sizes(parallel: ParallelConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the sizes that stay as given: those of `parallel` that are no defaults, and those that `overrides` name."""
    default, named = ParallelConfig(), [text.lstrip("+").partition("=")[0] for text in overrides]
    given = {name: getattr(parallel, name) for name in _NAMES}
    return {name: value for name, value in given.items() if value != getattr(default, name) or f"parallel.{name}" in named}


def search(
    config: Config,
    sizes: Mapping[str, Any],
    machine: Machine,
    fixed: Mapping[str, Any] | None = None,
    *,
    is_enough: bool = False,
) -> Found:
    """Finds the layouts of `machine` for a run of `config`, whose model has the native settings `sizes`.

    `fixed` are sizes that are given; with `is_enough` the first that fits ends the search. Raises ConfigError where
    the model's sizes aren't known, and where no layout is legal, with what keeps the most nearly legal one.
    """
    work = work_of(config, sizes)
    model = step_time.Model(work, machine)
    room = machine.device.memory_gib * GIB * config.plan.usable
    fitting: list[Candidate] = []
    closest, too_large, most = None, 0, float("inf")
    peak = model.flops * machine.count
    per_token = work.shape.flops_per_token(work.seq_length, is_frozen=bool(work.rank))
    for layout in legal_layouts(config, sizes, machine.count, fixed or {}):
        needs = memory.expected(work, layout)
        stage = max(needs, key=lambda number: needs[number].total)
        fits = needs[stage].total <= room
        too_large += not fits
        if not fits and needs[stage].total >= most:
            continue
        time = model.step(layout)
        speed = work.global_batch_size * work.seq_length / time.total
        candidate = Candidate(layout, needs[stage], stage, time, speed, speed * per_token / peak)
        if fits:
            fitting.append(candidate)
            if is_enough:
                break
        else:
            closest, most = candidate, needs[stage].total
    if not fitting and closest is None:
        raise ConfigError(_nothing_legal(config, sizes, machine.count, fixed or {}))
    return Found(machine, work, room, tuple(sorted(fitting, key=_order)), too_large, closest)


def _order(candidate: Candidate) -> tuple[object, ...]:
    """Sorts the fastest first; of equals the one that cuts the model least."""
    sizes = candidate.layout.topology.sizes()
    return round(candidate.time.total, 9), sizes["tp"] * sizes["pp"] * sizes["cp"], sizes["ep"], sizes["vpp"]


def problems_of(config: Config, sizes: Mapping[str, Any], layout: ParallelLayout) -> list[str]:
    """Returns every rule that a layout breaks: the model's, the backend's, the batches'."""
    return _Rules(config, sizes).of(layout)


class _Rules:
    """The rules of one run, with what doesn't depend on the layout looked up once."""

    def __init__(self, config: Config, sizes: Mapping[str, Any]) -> None:
        self.backend = layout_rules.backend_of_run(config)
        self.configs = {is_cut: _with_sequence(config, is_cut) for is_cut in (False, True)}
        self.gets = {is_cut: layout_rules.of_run(run, sizes) for is_cut, run in self.configs.items()}

    def of_model(self, layout: ParallelLayout) -> list[str]:
        return layout_rules.model_problems(self.gets[layout.sequence_parallel], layout.topology, backend=self.backend)

    def of(self, layout: ParallelLayout) -> list[str]:
        return [*self.of_model(layout), *layout_rules.step_problems(self.configs[layout.sequence_parallel], layout.topology)]


def _with_sequence(config: Config, is_cut: bool) -> Config:
    return replace(config, parallel=replace(config.parallel, sequence_parallel=is_cut, layout=None))


def legal_layouts(config: Config, sizes: Mapping[str, Any], count: int, fixed: Mapping[str, Any]) -> Iterator[ParallelLayout]:
    """Yields every layout of `count` ranks that breaks no rule, with the `fixed` sizes."""
    rules = _Rules(config, sizes)
    layers = rules.gets[False]("num_layers")
    has_experts = rules.gets[False]("num_moe_experts") is not None

    def allowed(name: str, found: Sequence[int]) -> list[int]:
        given = fixed.get(name)
        return list(found) if given is None else [size for size in found if size == given]

    def passes(sp: Sequence[bool], **given: int) -> bool:
        """Whether a part of a layout breaks no rule that it would break as a whole, too."""
        return any(not rules.of_model(ParallelLayout(Topology(**given), is_cut)) for is_cut in sp)

    for tp in allowed("tp", layout_rules.divisors(count)):
        sp = _sequence_choices(tp, fixed)
        if not passes(sp, tp=tp, etp=1):
            continue
        for pp in allowed("pp", layout_rules.divisors(count // tp)):
            if not passes(sp, tp=tp, etp=1, pp=pp):
                continue
            for cp in allowed("cp", layout_rules.divisors(count // (tp * pp))):
                dp = count // (tp * pp * cp)
                if not allowed("dp", [dp]) or layout_rules.batch_problems(
                    config.recipe.global_batch_size, config.recipe.micro_batch_size, dp
                ):
                    continue
                for ep, etp in _expert_sizes(tp * cp * dp, tp, allowed, passes, sp, has_experts=has_experts):
                    for vpp in allowed("vpp", range(1, _most_chunks(layers, pp) + 1)):
                        topology = Topology(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, dp=dp)
                        legal = (each for is_cut in sp if not rules.of(each := ParallelLayout(topology, is_cut)))
                        if (layout := next(legal, None)) is None:
                            break  # what forbids some chunks forbids more
                        yield layout


def _sequence_choices(tp: int, fixed: Mapping[str, Any]) -> list[bool]:
    if "sequence_parallel" in fixed:
        return [bool(fixed["sequence_parallel"])]
    return [True, False] if tp > 1 else [False]


def _most_chunks(layers: int, pp: int) -> int:
    """Chunks of a stage beyond which some have no layer, whatever the rest; the rule itself is asked of each."""
    return 1 if pp == 1 else max(1, (layers + 2) // pp)


def _expert_sizes(
    stage_size: int,
    tp: int,
    allowed: Callable[[str, Sequence[int]], list[int]],
    passes: Callable[..., bool],
    sp: Sequence[bool],
    *,
    has_experts: bool,
) -> Iterator[tuple[int, int | None]]:
    """Yields (ep, etp) of a stage: for a model without experts none but 1, with etp as tp."""
    if not has_experts:
        yield from [(1, None)] if allowed("ep", [1]) and allowed("etp", [tp]) else []
        return
    for ep in allowed("ep", layout_rules.divisors(stage_size)):
        for etp in allowed("etp", layout_rules.divisors(stage_size // ep)):
            if passes(sp, tp=tp, ep=ep, etp=etp, dp=stage_size // tp):
                yield ep, etp


def _nothing_legal(config: Config, sizes: Mapping[str, Any], count: int, fixed: Mapping[str, Any]) -> str:
    """Returns the message for no legal layout: the rules that the most nearly legal one breaks."""
    rules = _Rules(config, sizes)
    found: list[tuple[int, str, list[str]]] = []
    for tp in layout_rules.divisors(count):
        for pp in layout_rules.divisors(count // tp):
            layout = ParallelLayout(Topology(tp=tp, pp=pp, dp=count // (tp * pp)), tp > 1)
            problems = rules.of(layout)
            given = {**layout.topology.sizes(), "sequence_parallel": layout.sequence_parallel}
            problems += [f"parallel.{name}={value} is given." for name, value in fixed.items() if given[name] != value]
            found.append((len(problems), str(layout), problems))
    _, name, problems = min(found, key=lambda each: each[0])
    return (
        f"model={config.model.name} allows no layout of {count} processes; the most nearly allowed, {name}, breaks: "
        f"{' '.join(problems)}"
    )
