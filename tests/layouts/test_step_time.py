"""The expected time of a step: what was measured comes out as docs/scale.md says, and what must be slower is."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from megabridge.layouts import devices, links
from megabridge.layouts.links import Group
from megabridge.layouts.parallel_layout import ParallelLayout
from megabridge.parallel.topology import Topology
from tests.support.command import ROOT
from tests.support.layouts import FULL, config, gib, model, seconds, speed

RECIPE = {"seq_length": 4096, "micro_batch_size": 4, "global_batch_size": 32}
ONE = config("llama32_1b", recipe=RECIPE)
MIXTURE = config("qwen3_30b_a3b", hf={"num_hidden_layers": 4}, recipe={**RECIPE, "micro_batch_size": 2, "global_batch_size": 16})
# By the first two cells of docs/scale.md's table.
MEASURED = {
    ("llama32_1b_sft", "4,096"): ONE,
    ("llama32_1b_sft", "8,192"): config("llama32_1b", recipe={"seq_length": 8192, "micro_batch_size": 2, "global_batch_size": 16}),
    ("llama31_8b_lora", "4,096"): config(
        "llama31_8b", recipe={"seq_length": 4096, "micro_batch_size": 1, "global_batch_size": 8}, peft={"name": "lora"}
    ),
    ("Qwen3-30B-A3B, 4 layers", "4,096"): MIXTURE,
}
WIDE = {"seq_length": 4096, "micro_batch_size": 1, "global_batch_size": 64}
BIG = config("llama33_70b", recipe=WIDE)


def test_measured_points_come_out_as_the_page_says() -> None:
    text = (ROOT / "docs" / "scale.md").read_text()
    rows = {
        (cells[0].strip("` "), cells[1].strip()): [float(cell.replace(",", "").rstrip(" %")) for cell in cells[2:5]]
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 6 and re.match(r"\d+,\d+$", cells[1])
    }
    assert rows.keys() == MEASURED.keys()
    for key, run in MEASURED.items():
        measured, expected, error = rows[key]
        assert speed(run) == pytest.approx(expected, rel=1e-3), key
        assert 100 * (expected / measured - 1) == pytest.approx(error, abs=0.06), key
        assert abs(error) < 5


def test_parts_of_the_measured_step_come_out() -> None:
    """docs/performance.md's kernels of a step: matrix products 1,327 ms, attention 353, loss 57."""
    one, layout = model(ONE), ParallelLayout(Topology())
    layers, micro_batches = 16, 8
    kind = one.work.shape.kinds[0]
    logits = one.elements(3.0 * 4 * 4096 * 128256) * micro_batches
    products = one._products(layout, kind) * layers * micro_batches + one._head(layout).compute * micro_batches - logits
    assert products == pytest.approx(1.327, rel=0.02)
    assert one._attention(layout, kind) * layers * micro_batches == pytest.approx(0.353, rel=0.02)
    assert logits == pytest.approx(0.057, rel=0.05)


def step(run: object, *, sp: bool = False, **sizes: int) -> float:
    return seconds(run, ParallelLayout(Topology(**sizes), sp)).total  # type: ignore[arg-type]


def test_parts_add_up_and_are_where_they_belong() -> None:
    for layout in (
        ParallelLayout(Topology(tp=4, pp=4, vpp=2, dp=2), True),
        ParallelLayout(Topology(dp=8)),
        ParallelLayout(Topology(tp=2, cp=2, dp=2)),
    ):
        found = seconds(BIG, layout)
        parts = vars(found)
        assert found.total == pytest.approx(sum(parts.values())) and all(part >= 0 for part in parts.values())
        sizes = layout.topology
        assert (found.tensor > 0) == (sizes.tp > 1) and (found.context > 0) == (sizes.cp > 1) and found.expert == 0
        assert (found.bubble > 0) == (found.pipeline > 0) == (sizes.pp > 1) and (found.data > 0) == (sizes.dp * sizes.cp > 1)
    assert (
        seconds(MIXTURE, ParallelLayout(Topology(ep=4, dp=4))).expert > 0 == seconds(MIXTURE, ParallelLayout(Topology(dp=4))).expert
    )


def test_more_bubble_is_slower() -> None:
    """Fewer micro-batches for the same tokens, and fewer chunks, leave stages idle longer."""
    few, many = (replace(BIG.recipe, global_batch_size=count) for count in (8, 64))
    layout = ParallelLayout(Topology(tp=8, pp=8), True)
    shares = [seconds(replace(BIG, recipe=recipe), layout) for recipe in (few, many)]
    assert shares[0].bubble / shares[0].total > shares[1].bubble / shares[1].total
    assert shares[0].total / 8 > shares[1].total / 64, "per sequence"
    bubbles = [seconds(BIG, ParallelLayout(Topology(tp=8, pp=8, vpp=vpp), True)) for vpp in (1, 2, 5)]
    assert bubbles[0].bubble > bubbles[1].bubble > bubbles[2].bubble
    assert bubbles[1].pipeline == pytest.approx(bubbles[0].pipeline), "two chunks send twice as much, of which half waits"
    assert bubbles[1].pipeline < bubbles[2].pipeline
    even, uneven = (config("llama33_70b", hf={"num_hidden_layers": count}, recipe=WIDE) for count in (80, 81))
    assert step(uneven, tp=8, pp=8) - step(even, tp=8, pp=8) > step(even, tp=8, pp=8) / 81, "more than one layer's share: a stage"


def test_slower_links_are_slower() -> None:
    device = devices.device("h100")
    for size in (2, 4, 8):
        inside, across = (links.ring(1e9, Group(size, stride), device) for stride in (1, 8))
        assert across > 5 * inside, "each on a host of its own"
        assert links.all_to_all(1e9, Group(size, 8), device) > links.all_to_all(1e9, Group(size, 1), device)
    assert links.ring(1e9, Group(16, 1), device) > links.ring(1e9, Group(8, 1), device), "two hosts, eight links between them"
    assert links.ring(1e9, Group(2, 3), device) > links.ring(1e9, Group(2, 1), device), "a group that some hosts cut in two"
    assert links.ring(1e9, Group(1, 1), device) == links.all_to_all(1e9, Group(1, 8), device) == 0
    inside, across = ParallelLayout(Topology(tp=8, dp=2), True), ParallelLayout(Topology(tp=16), True)
    assert seconds(BIG, across).tensor / 64 > seconds(BIG, inside).tensor / 32, "for each micro-batch"
    two = replace(device, per_host=2)
    assert seconds(BIG, inside, two).tensor > 3 * seconds(BIG, inside).tensor
    for name in ("inside_gbs", "between_gbs", "memory_gbs", "tflops_16bit"):
        slow = replace(device, **{name: getattr(device, name) / 2})
        layout = ParallelLayout(Topology(tp=8, pp=2, dp=4), True)
        assert seconds(BIG, layout, slow).total > seconds(BIG, layout).total, name


def test_overlap_hides_what_it_can() -> None:
    layout = ParallelLayout(Topology(dp=8))
    overlapped = replace(ONE, optimizer=replace(ONE.optimizer, overlap_grad_reduce=True, overlap_param_gather=True))
    bare, hidden = seconds(ONE, layout), seconds(overlapped, layout)
    assert 0 < hidden.data < bare.data / 5 and hidden.compute == bare.compute
    slow = replace(devices.device("h100"), inside_gbs=1.0)
    assert seconds(overlapped, layout, slow).data > seconds(ONE, layout, slow).data / 2, (
        "no more than there is to compute meanwhile"
    )


def test_recomputation_costs_time_and_saves_memory() -> None:
    again = config("llama32_1b", recipe=RECIPE, provider=FULL)
    assert 1.15 < step(again) / step(ONE) < 1.4 and gib(again, ParallelLayout(Topology())) < 0.8 * gib(
        ONE, ParallelLayout(Topology())
    )


def test_memory_grows_with_what_is_held() -> None:
    def needs(**recipe: int) -> float:
        return gib(replace(BIG, recipe=replace(BIG.recipe, **recipe)), ParallelLayout(Topology(tp=8, pp=4), True))

    assert needs(micro_batch_size=1) < needs(micro_batch_size=2) < needs(micro_batch_size=4)
    assert needs(seq_length=4096) < needs(seq_length=8192)
    for name in ("tp", "pp", "dp"):
        sizes = [gib(BIG, ParallelLayout(Topology(**{"tp": 4, "pp": 2, "dp": 2, name: size}), True)) for size in (2, 4, 8)]
        assert sizes == sorted(sizes, reverse=True), name
    single = {
        name: gib(MIXTURE, ParallelLayout(Topology(**{name: 4, **({"dp": 4} if name == "ep" else {})}))) for name in ("dp", "ep")
    }
    assert single["ep"] < single["dp"]
    assert gib(BIG, ParallelLayout(Topology(tp=8), True)) < gib(BIG, ParallelLayout(Topology(tp=8)))
