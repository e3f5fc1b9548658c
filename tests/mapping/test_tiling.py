"""Tilings against counting every element with numpy."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megabridge.mapping import Cut, Dims, Fuse, Run, transfers
from megabridge.mapping.tiling import Box, Flaw, flaw, hf_boxes, native_boxes

RUNS = st.builds(
    lambda start, count, block, gap: Run(start, count, block, block + gap if count > 1 else block),
    st.integers(-1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2),
)


def counted(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    """How many boxes hold each element, with a margin of 2 before and 20 behind in every dimension."""
    counts = np.zeros([length + 22 for length in shape], dtype=int)
    for box in boxes:
        counts[
            np.ix_(*([2 + run.start + i * run.stride + j for i in range(run.count) for j in range(run.block)] for run in box))
        ] += 1
    return counts


def is_tiled(counts: np.ndarray, shape: tuple[int, ...], *, gaps: bool) -> bool:
    inside = counts[tuple(slice(2, 2 + length) for length in shape)]
    return counts.sum() == inside.sum() and inside.max() <= 1 and (gaps or inside.min() == 1)


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    boxes=st.lists(st.tuples(RUNS, RUNS), max_size=4),
    gaps=st.booleans(),
)
@settings(max_examples=3000, deadline=None, derandomize=True)
def test_random_boxes(shape: tuple[int, int], boxes: list[Box], gaps: bool) -> None:
    counts = counted(shape, boxes)
    found = flaw(shape, boxes, allow_gaps=gaps)
    assert (found is None) == is_tiled(counts, shape, gaps=gaps)
    if found is not None and all(0 <= start < stop <= length for (start, stop), length in zip(found.where, shape, strict=True)):
        there = counts[tuple(slice(2 + start, 2 + stop) for start, stop in found.where)]
        assert (there == found.times).all() and found.times != 1


@given(cuts=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 23)), max_size=6), change=st.integers(0, 3))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_a_tensor_cut_in_pieces_and_then_damaged(cuts: list[tuple[int, int]], change: int) -> None:
    """Pieces of a tensor tile it; losing one, doubling one or moving one is found."""
    boxes: list[Box] = [(Run.span(0, 24), Run.span(0, 24))]
    for dim, at in cuts:
        boxes = [piece for box in boxes for piece in _halves(box, dim, at)]
    assert flaw((24, 24), boxes) is None
    damaged = list(boxes)
    last = damaged.pop()
    damaged += [
        [],
        [last, last],
        [(Run.span(last[0].start + 1, last[0].size), last[1])],
        [(last[0], Run.span(last[1].start, last[1].size + 1))],
    ][change]
    assert flaw((24, 24), damaged) is not None


def _halves(box: Box, dim: int, at: int) -> list[Box]:
    run = box[dim]
    if not run.start < at < run.start + run.size:
        return [box]
    parts = [Run.span(run.start, at - run.start), Run.span(at, run.start + run.size - at)]
    return [(*box[:dim], part, *box[dim + 1 :]) for part in parts]


def test_the_shares_of_a_layout_tile_both_sides() -> None:
    """QKV with fewer groups than ranks, cut in the middle of a group; a flaw says where it is."""
    dims = Dims(num_layers=1, hidden_size=1, num_attention_heads=8, num_query_groups=2, vocab_size=1, tied=False)
    layout, native = Fuse("num_query_groups", ("heads_per_group", 1, 1)), (12 * 4, 5)
    shares = [transfers(layout, native, dims, (Cut(0, 1, 4, index),)) for index in range(4)]
    for part, shape in enumerate(layout.part_shapes(native, dims)):
        boxes = [box for share in shares for box in hf_boxes(t for t in share if t.part == part)]
        assert flaw(shape, boxes) is None
        missing = flaw(shape, boxes[1:])
        assert missing is not None and missing.times == 0
    for share in shares:
        assert flaw((12, 5), native_boxes(share)) is None
    assert str(flaw((8, 5), [(Run.span(0, 3), Run.span(0, 5))])) == "[3:8, 0:5] belongs to no boxes"
    assert flaw((8,), [(Run.span(0, 8),), (Run.span(4, 2),)]) == Flaw(((4, 6),), 2)
