"""Cuts of layouts against the same thing done by numpy on whole tensors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabridge.errors import MappingError
from megabridge.mapping import (
    Axis,
    ConcatRows,
    Cut,
    Dims,
    Fuse,
    Interleave,
    InterleaveColumns,
    Layout,
    Run,
    Same,
    Stack,
    Transpose,
    coalesced,
    coalescible,
    transfers,
)
from megabridge.mapping.boxes import clip


def indices(run: Run) -> list[int]:
    return [run.start + i * run.stride + j for i in range(run.count) for j in range(run.block)]


@given(
    start=st.integers(0, 5),
    count=st.integers(1, 5),
    block=st.integers(1, 4),
    gap=st.integers(0, 3),
    low=st.integers(0, 45),
    width=st.integers(0, 45),
)
@settings(max_examples=2000, deadline=None)
def test_clip_keeps_exactly_the_pairs_inside(start: int, count: int, block: int, gap: int, low: int, width: int) -> None:
    native = Run(start, count, block, block + gap if count > 1 else block)
    hf = Run(100, count, block, block)
    pairs = dict(zip(indices(native), indices(hf), strict=True))
    parts = clip(Axis(0, 0, native, hf), low, low + width)
    got = [pair for part in parts for pair in zip(indices(part.native), indices(part.hf), strict=True)]
    assert len(parts) <= 3
    assert sorted(got) == sorted((n, h) for n, h in pairs.items() if low <= n < low + width)


def dims(heads: int, groups: int, vocab: int = 1) -> Dims:
    return Dims(num_layers=1, hidden_size=1, num_attention_heads=heads, num_query_groups=groups, vocab_size=vocab, tied=False)


def fused(parts: list[np.ndarray], groups: int) -> np.ndarray:
    """The definition: in each group, the group's share of every part, one after another."""
    shares = [np.split(part, groups) for part in parts]
    return np.concatenate([share[g] for g in range(groups) for share in shares])


def held(whole: np.ndarray, cut: Cut) -> np.ndarray:
    sections = np.split(whole, cut.stride, axis=cut.dim)
    return np.concatenate([np.split(section, cut.size, axis=cut.dim)[cut.index] for section in sections], axis=cut.dim)


def filled(layout: Layout, parts: list[np.ndarray], whole: np.ndarray, sizes: Dims, cut: Cut | None) -> np.ndarray:
    """A share put together from transfers, through the same views that reading uses."""
    local = held(whole, cut) if cut else whole
    out = np.full(local.shape, -1)
    for move in transfers(layout, whole.shape, sizes, (cut,) if cut else ()):
        assert move.hf_shape == parts[move.part].shape
        place = np.lib.stride_tricks.as_strided
        shape, strides, offset = move.native_view(tuple(s // out.itemsize for s in out.strides))
        target = place(out.reshape(-1)[offset:], shape, [s * out.itemsize for s in strides])
        shape, strides, offset = move.hf_view()
        target[...] = place(parts[move.part].reshape(-1)[offset:], shape, [s * out.itemsize for s in strides])
        length, starts = move.contiguous_runs()
        assert move.contiguous_run_count == len(starts)
        flat = parts[move.part].reshape(-1)
        assert [x for s in starts for x in flat[s : s + length]] == target.reshape(-1).tolist()
    return out


@pytest.mark.parametrize("heads,groups", [(8, 8), (8, 4), (8, 2), (8, 1), (12, 3), (6, 6)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("columns", [0, 5])
def test_qkv_under_any_tensor_parallel_size(heads: int, groups: int, size: int, columns: int) -> None:
    head = 4
    rows = [heads * head, groups * head, groups * head]
    shapes = [(r, columns) if columns else (r,) for r in rows]
    edges = np.cumsum([0, *(int(np.prod(s)) for s in shapes)])
    parts = [np.arange(a, b).reshape(s) for a, b, s in zip(edges, edges[1:], shapes, strict=False)]
    whole = fused(parts, groups)
    if whole.shape[0] % size:
        with pytest.raises(MappingError, match="can't be cut"):
            transfers(Fuse("num_query_groups", ("heads_per_group", 1, 1)), whole.shape, dims(heads, groups), (Cut(0, 1, size, 0),))
        return
    for index in range(size):
        cut = Cut(0, 1, size, index)
        got = filled(Fuse("num_query_groups", ("heads_per_group", 1, 1)), parts, whole, dims(heads, groups), cut)
        assert np.array_equal(got, held(whole, cut))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gate_and_up_with_partition_stride(size: int) -> None:
    parts = [np.arange(24).reshape(8, 3), np.arange(24, 48).reshape(8, 3)]
    whole = np.concatenate(parts)
    for index in range(size):
        cut = Cut(0, 2, size, index)
        assert np.array_equal(filled(Fuse(), parts, whole, dims(1, 1), cut), held(whole, cut))
        assert len(transfers(Fuse(), whole.shape, dims(1, 1), (cut,))) == 2


@given(vocab=st.integers(1, 40), size=st.integers(1, 5), multiple=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_padded_vocabulary_feeds_only_real_rows(vocab: int, size: int, multiple: int) -> None:
    padded = -(-vocab // (size * multiple)) * size * multiple
    table = np.arange(vocab * 3).reshape(vocab, 3)
    whole = np.concatenate([table, np.full((padded - vocab, 3), -1)])
    for index in range(size):
        cut = Cut(0, 1, size, index)
        assert np.array_equal(filled(Same("vocab_size"), [table], whole, dims(1, 1, vocab), cut), held(whole, cut))


def test_column_cut_and_split_keep_every_element() -> None:
    whole = np.arange(6 * 8).reshape(6, 8)
    for index in range(4):
        cut = Cut(1, 1, 4, index)
        (move,) = transfers(Same(), whole.shape, dims(1, 1), (cut,))
        assert move.contiguous_runs() == (2, [r * 8 + index * 2 for r in range(6)])
        pieces = list(move.split(4))
        assert sum(piece.elements for piece in pieces) == 12
        assert all(piece.elements <= 4 for piece in pieces)
        starts = [start + i for piece in pieces for start in piece.contiguous_runs()[1] for i in range(piece.contiguous_runs()[0])]
        assert sorted(starts) == sorted(held(whole, cut).reshape(-1).tolist())


def test_heads_that_contradict_the_shape_are_refused() -> None:
    with pytest.raises(MappingError, match="can't be shared by 3 groups"):
        Fuse("num_query_groups", ("heads_per_group", 1, 1)).part_shapes((32, 4), dims(6, 3))
    with pytest.raises(MappingError, match="vocab_size=40 is more than the 32 rows"):
        Same("vocab_size").part_shapes((32, 4), dims(1, 1, 40))
    with pytest.raises(MappingError, match="asks for the size 'nothing'"):
        Fuse("nothing").part_shapes((32, 4), dims(1, 1))


def test_gate_and_up_by_column_are_one_box_of_whole_rows() -> None:
    layout, sizes = Stack(4, Transpose(Interleave())), Dims(1, 8, 2, 2, 8, tied=False)
    moves = transfers(layout, (4, 12, 8), sizes, (Cut(0, 1, 2, 1),))
    assert [move.contiguous_run_count for move in moves] == [2 * 8 * 6] * 2
    (group,) = coalescible(moves)
    assert sorted(group, key=moves.index) == list(moves)
    assert coalesced(group).contiguous_runs() == (2 * 8 * 12, [2 * 8 * 12])
    halves = [coalesced(parts) for parts in zip(*(move.split(6) for move in group), strict=True)]
    assert [part.contiguous_runs() for part in halves] == [(12, [12 * row]) for row in range(16, 32)]
    assert [len(one) for one in coalescible(moves[:1])] == [1]  # a gap
    assert all(len(one) == 1 for one in coalescible(transfers(layout, (4, 12, 8), sizes, (Cut(1, 1, 2, 0),))))


EXPERTS, ROWS, RANK = 4, 12, 3
PILED = np.arange(EXPERTS * RANK * ROWS).reshape(EXPERTS * RANK, ROWS)
SHARED = np.arange(EXPERTS * RANK * ROWS).reshape(ROWS, RANK * EXPERTS)
BY_EXPERT = SHARED.reshape(ROWS, RANK, EXPERTS).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "cut", [None, *(Cut(dim, 1, size, index) for dim, size in ((0, 2), (0, 4), (1, 3)) for index in range(size))]
)
@pytest.mark.parametrize(
    ("layout", "tensor", "whole"),
    [
        (ConcatRows(EXPERTS), PILED, PILED.reshape(EXPERTS, RANK, ROWS)),
        (ConcatRows(EXPERTS, Transpose()), PILED, PILED.reshape(EXPERTS, RANK, ROWS).transpose(0, 2, 1)),
        (InterleaveColumns(EXPERTS), SHARED, BY_EXPERT),
        (InterleaveColumns(EXPERTS, Transpose()), SHARED, BY_EXPERT.transpose(0, 2, 1)),
        (InterleaveColumns(EXPERTS, Interleave()), SHARED, np.concatenate([BY_EXPERT[:, ::2], BY_EXPERT[:, 1::2]], 1)),
    ],
)
def test_adapters_of_all_experts_in_one(layout: Layout, tensor: np.ndarray, whole: np.ndarray, cut: Cut | None) -> None:
    assert np.array_equal(filled(layout, [tensor], whole, dims(1, 1), cut), held(whole, cut) if cut else whole)


@pytest.mark.parametrize(("size", "stretch"), [(1, RANK * EXPERTS), (2, EXPERTS // 2)])
def test_columns_of_a_ranks_experts_are_one_box(size: int, stretch: int) -> None:
    shape, cut = (EXPERTS, ROWS, RANK), Cut(0, 1, size, size - 1)
    moves = transfers(InterleaveColumns(EXPERTS, Interleave()), shape, dims(1, 1), (cut,))
    groups = coalescible(moves)
    assert sorted(map(len, groups)) == [EXPERTS // size] * 2, "even and odd rows"
    boxes = [coalesced(group) for group in groups]
    assert {box.contiguous_runs()[0] for box in boxes} == {stretch}
    alone = [start for move in moves for start in move.contiguous_runs()[1]]
    assert sorted(start + i for box in boxes for start in box.contiguous_runs()[1] for i in range(stretch)) == sorted(alone)
