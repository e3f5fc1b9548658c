"""The layouts that are found: all that no rule forbids, the fastest that fit first, and what is said where there are none."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from megabridge.config.schema import Config, ParallelConfig
from megabridge.errors import ConfigError
from megabridge.families.core.known_sizes import known_sizes
from megabridge.layouts import memory, search
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.layouts.work import work_of
from megabridge.parallel.topology import Topology
from tests.support.layouts import FULL, config, found, machine

BATCH = {"seq_length": 512, "global_batch_size": 24, "micro_batch_size": 1}
# Heads that 3 and 6 divide, layers that few chunks divide; experts; a backend with context parallelism.
SMALL: list[tuple[int, Config]] = [
    (12, config("smollm2_135m", hf={"num_hidden_layers": 7}, recipe=BATCH)),
    (8, config("tiny_moe", hf={"num_hidden_layers": 3}, recipe=BATCH)),
    (8, config("tiny_llama", recipe=BATCH, backend={"name": "te"})),
    (6, config("tiny_llama", recipe=BATCH, backend={"name": "local"})),
]


def brute(run: Config, count: int) -> set[str]:
    """Every layout of `count` ranks that the rules allow, from all sizes that there can be."""
    sizes = known_sizes(run.model)
    numbers = range(1, count + 1)
    chunks = range(1, sizes["num_layers"] + 3)
    has_experts = sizes.get("num_moe_experts") is not None
    legal: dict[Topology, ParallelLayout] = {}
    for tp, pp, cp, vpp in product(numbers, numbers, numbers, chunks):
        if count % (tp * pp * cp):
            continue
        for ep, etp, is_cut in product(numbers, numbers if has_experts else [tp], (True, False)):
            try:
                topology = Topology(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, dp=count // (tp * pp * cp))
            except ConfigError:
                continue
            layout = ParallelLayout(topology, is_cut)
            if not search.problems_of(run, sizes, layout):
                legal.setdefault(topology, layout)
    return {str(layout) for layout in legal.values()}


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_all_legal_layouts_are_found_and_no_others(number: int) -> None:
    count, run = SMALL[number]
    legal = [str(layout) for layout in search.legal_layouts(run, known_sizes(run.model), count, {})]
    assert len(legal) == len(set(legal)) > 4
    assert set(legal) == brute(run, count)


def test_given_sizes_stay() -> None:
    count, run = SMALL[1]
    every = list(search.legal_layouts(run, known_sizes(run.model), count, {}))
    fixed: list[dict[str, Any]] = [{"tp": 2}, {"ep": 4}, {"pp": 2, "vpp": 1}, {"dp": 8}, {"sequence_parallel": False}, {"etp": 1}]
    for given in fixed:
        wanted = [
            layout
            for layout in every
            if all(
                {**layout.topology.sizes(), "sequence_parallel": layout.sequence_parallel}[name] == size
                for name, size in given.items()
            )
        ]
        assert list(search.legal_layouts(run, known_sizes(run.model), count, given)) == wanted != every
    parallel = ParallelConfig(tp=2, auto=True)
    assert search.fixed_sizes(parallel, ["parallel.pp=1", "parallel=auto", "+model.provider.x=1"]) == {"tp": 2, "pp": 1}


def test_what_fits_is_ranked_by_its_time_and_the_rest_is_left_out() -> None:
    run = config("llama33_70b", recipe={**BATCH, "seq_length": 4096, "global_batch_size": 128})
    seen = found(run, machine(32))
    times = [each.time.total for each in seen.fitting]
    assert times == sorted(times) and seen.best is seen.fitting[0]
    assert all(each.memory.total <= seen.room for each in seen.fitting) and seen.too_large > 0
    assert seen.closest is not None and seen.closest.memory.total > seen.room
    more = found(run, machine(32, memory_gib=120.0))
    assert more.too_large < seen.too_large and len(more.fitting) + more.too_large == len(seen.fitting) + seen.too_large
    assert more.best.time.total <= seen.best.time.total, "room for more can't be slower"
    content = seen.best.content()
    assert content["sizes"] == seen.best.layout.topology.sizes() and content["mfu"] == seen.best.mfu


def test_the_closest_is_named_where_nothing_fits() -> None:
    run = config("llama31_8b", recipe={**BATCH, "seq_length": 4096, "global_batch_size": 8})
    with pytest.raises(ConfigError) as said:
        found(run, machine(2)).best  # noqa: B018
    text = str(said.value)
    assert text.startswith("none of ") and "layouts of 2 x h100 fits: the closest, " in text and "peft=lora" in text
    seen = found(run, machine(2))
    assert seen.closest is not None
    needs = {
        str(layout): max(one.total for one in memory.expected(seen.work, layout).values())
        for layout in search.legal_layouts(run, known_sizes(run.model), 2, {})
    }
    assert min(needs, key=lambda name: needs[name]) == str(seen.closest.layout) and str(seen.closest.layout) in text
    missing = (needs[str(seen.closest.layout)] - seen.room) / 2**30
    assert f"so {missing:.2f} GiB are missing" in text
    long = config("llama32_1b", recipe={**BATCH, "seq_length": 65536, "micro_batch_size": 4})
    with pytest.raises(ConfigError, match=r"most of it activations.*use a smaller recipe.micro_batch_size, recomputation, more"):
        found(long, machine(1)).best  # noqa: B018
    for optimizer, remedy in (({"distributed": False}, "optimizer.distributed=true"), ({}, "use more devices or peft=lora")):
        run = config("llama31_405b", recipe={**BATCH, "global_batch_size": 8}, optimizer=optimizer, provider=FULL)
        with pytest.raises(ConfigError, match=remedy):
            found(run, machine(8)).best  # noqa: B018


def test_the_rules_are_named_where_nothing_is_legal() -> None:
    run = config("tiny_llama", recipe={**BATCH, "global_batch_size": 4})
    with pytest.raises(ConfigError, match=r"allows no layout of 11 processes.*recipe.global_batch_size=4 must be a multiple"):
        found(run, machine(11))
    with pytest.raises(ConfigError, match=r"parallel\.dp=3 is given"):
        found(run, machine(4), dp=3)
    with pytest.raises(ConfigError, match="name a model of conf/model"):
        found(replace(run, model=replace(run.model, hf={})), machine(2))
    with pytest.raises(ConfigError, match=r"take parallel\.layout, and what deals layers"):
        found(replace(run, parallel=replace(run.parallel, layout="Et|tL")), machine(2))


def test_a_layout_says_its_overrides() -> None:
    layout = ParallelLayout(Topology(tp=2, pp=2, ep=2, etp=1, dp=2), True)
    assert layout.overrides == [
        *(f"parallel.{name}=2" for name in ("tp", "pp", "ep", "dp")), "parallel.etp=1", "parallel.sequence_parallel=true",
    ]  # fmt: skip
    assert ParallelLayout(Topology()).overrides == ["parallel=single"] and str(layout) == "tp2pp2ep2dp2etp1sp"


def test_layers_are_dealt_as_the_provider_deals_them() -> None:
    run = config("deepseek_v3", provider={"mtp_num_layers": 1})
    work = work_of(run, known_sizes(run.model))
    dealt = work.dealt(Topology(pp=4, vpp=2))
    counts = [[sum(chunk) for chunk in stage] for stage in dealt.chunks]
    assert sum(map(sum, counts)) == 62 and counts[-1][-1] == 8, (
        "the last chunk has fewest layers, and the one that predicts further"
    )
    assert [[plain for plain, _ in stage] for stage in dealt.chunks] == [[3, 0], [0, 0], [0, 0], [0, 0]]
    assert [sum(count for _, count in kinds) for kinds in dealt.kinds] == list(map(sum, counts))
    assert dealt.heaviest == (0, 1, 2, 3)
    assert work.dealt(Topology(pp=32)).heaviest == (0, 1, 2, 30, 31), "the first with a mixture is not the first"


def test_micro_batches_under_way_are_those_of_the_schedule() -> None:
    for pp, vpp, micro_batches in product((2, 4), (2, 3), (4, 8, 40)):
        for stage in range(pp):
            passes = min((pp - stage - 1) * 2 + (vpp - 1) * pp + 1, micro_batches * vpp)
            turns = [number // pp % vpp for number in range(passes)]
            assert memory.in_flight(Topology(pp=pp, vpp=vpp), stage, micro_batches) == [turns.count(chunk) for chunk in range(vpp)]
    assert memory.in_flight(Topology(pp=4), 1, 2) == [2] and memory.in_flight(Topology(pp=4), 1, 9) == [3]
