"""Order, shapes and padding of batches: independent of the number of ranks, resumable, nothing lost in silence."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megabridge.data.batches import Batching, Order, PadTo, Sample, fit
from megabridge.data.module import Batch, RowRules
from megabridge.data.packing import pack
from megabridge.errors import ConfigError

PAD = 0


def samples(count: int, length: int = 9) -> list[Sample]:
    """Sample i has 2 + i % (length - 1) tokens, all 100 + i; the loss is on all but the first."""
    sizes = [2 + number % (length - 1) for number in range(count)]
    return [Sample([100 + number] * size, [False] + [True] * (size - 1)) for number, size in enumerate(sizes)]


def rows(batches: list[Batch]) -> list[list[int]]:
    """What is learned in each row, in order."""
    return [row[mask.bool()].tolist() for batch in batches for row, mask in zip(batch["labels"], batch["loss_mask"], strict=True)]


def steps(batching: Batching, count: int, *, consumed: int = 0, dp: int = 1, number_of_samples: int = 11) -> list[list[Batch]]:
    """All ranks' micro-batches of `count` steps, by step."""
    per_rank = batching.global_batch_size // batching.micro_batch_size // dp
    data = samples(number_of_samples, batching.seq_length)
    iterators = [batching.train(data, consumed, seed=7, dp_rank=rank, dp_size=dp) for rank in range(dp)]
    return [[batch for iterator in iterators for batch in islice(iterator, per_rank)] for _ in range(count)]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 40))
def test_a_steps_samples_do_not_depend_on_dp(micro: int, dp: int, times: int, count: int) -> None:
    batching = Batching(8, micro, micro * dp * times, PAD)
    alone = Batching(8, 1, micro * dp * times, PAD)
    for many, one in zip(steps(batching, 4, dp=dp, number_of_samples=count), steps(alone, 4, number_of_samples=count), strict=True):
        assert sorted(rows(many)) == sorted(rows(one))


def test_resumed_batches_are_the_ones_that_would_have_come() -> None:
    batching = Batching(8, 2, 4, PAD)
    through = [batch for step in steps(batching, 6) for batch in step]
    resumed = [batch for step in steps(batching, 4, consumed=8) for batch in step]
    for wanted, found in zip(through[4:], resumed, strict=True):
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_every_epoch_has_every_sample_once_in_another_order() -> None:
    order = Order(10, seed=3)
    epochs = [[order.sample(epoch * 10 + place) for place in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [Order(10, seed=3).sample(position) for position in (25, 4)] == [epochs[2][5], epochs[0][4]]
    assert [Order(10, seed=4).sample(place) for place in range(10)] != epochs[0]


def test_the_order_of_a_seed_is_pinned() -> None:
    # A change here would make resumed runs see other batches than those they were started with.
    assert [Order(8, seed=1).sample(place) for place in range(8)] == [1, 5, 4, 2, 7, 0, 3, 6]


def test_a_batch_is_shifted_padded_and_masked() -> None:
    sample = Sample([5, 6, 7, 8], [False, False, True, True])
    batch = Batching(6, 2, 2, pad_token=9).collate([(sample,)], 6)
    assert batch["tokens"].tolist() == [[5, 6, 7, 9, 9, 9], [9] * 6]
    assert batch["labels"].tolist() == [[6, 7, 8, 9, 9, 9], [9] * 6]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, 0, 0, 0], [0] * 6]
    assert batch["position_ids"].tolist() == [list(range(6))] * 2
    kinds = {name: tensor.dtype for name, tensor in batch.items()}
    assert kinds.pop("loss_mask") == torch.float32 and set(kinds.values()) == {torch.int64}


@pytest.mark.parametrize(("pad_to", "multiple", "unit"), [("longest", 1, 1), ("longest", 3, 3), (2, 3, 6), (3, 1, 3)])
def test_rows_are_padded_to_the_longest_of_their_micro_batch_or_step(pad_to: PadTo, multiple: int, unit: int) -> None:
    def needed(batches: list[Batch]) -> int:
        return min(-(-max(int(batch["lengths"].max()) for batch in batches) // unit) * unit, 8)

    for is_common in (False, True):
        batching = Batching(8, 2, 8, PAD, pad_to=pad_to, row_rules=RowRules(multiple, is_common))
        for step in steps(batching, 10, dp=2, number_of_samples=5):
            for batch in step:
                assert batch["tokens"].shape == (2, needed(step if is_common else [batch]))
                assert batch["lengths"].tolist() == batch["loss_mask"].sum(1).tolist()
        parts = [batching.validation(samples(7, 8), dp_rank=rank, dp_size=2) for rank in range(2)]
        everything = [batch for part in parts for batch in part]
        for batch in everything:
            assert batch["tokens"].shape == (2, needed(everything if is_common else [batch]))
    full = Batching(8, 2, 8, PAD)
    assert all(batch["tokens"].shape == (2, 8) for step in steps(full, 3) for batch in step)


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_validation_has_every_sample_once_and_as_many_batches_on_every_rank(dp: int) -> None:
    batching = Batching(8, 2, 12, PAD)
    data = samples(7, 8)
    per_rank = [batching.validation(data, dp_rank=rank, dp_size=dp) for rank in range(dp)]
    assert len({len(batches) for batches in per_rank}) == 1
    found = [row for batches in per_rank for row in rows(batches) if row]
    assert sorted(found) == sorted([list(sample.tokens[1:]) for sample in data])
    assert all(batch["tokens"].shape == (2, 8) for batches in per_rank for batch in batches)


def test_overlong_samples_are_cut_or_left_out_and_counted() -> None:
    long, short, unanswered = Sample([1] * 7, [True] * 7), Sample([1] * 5, [True] * 5), Sample([1] * 7, [False] * 5 + [True] * 2)
    cut = fit([long, short, unanswered], seq_length=4, overlong="truncate")
    assert [len(sample.tokens) for sample in cut.samples] == [5, 5]
    assert (cut.truncated, cut.dropped, cut.unanswered) == (1, 0, 1)
    assert "1 truncated" in cut.describe() and "1 left out: no token of an answer" in cut.describe()
    left = fit([long, short, unanswered], seq_length=4, overlong="drop")
    assert (len(left.samples), left.truncated, left.dropped, left.unanswered) == (1, 0, 2, 0)
    assert "2 too long and left out" in left.describe()


def test_when_nothing_is_left_the_error_says_what_would_do() -> None:
    data = [Sample([1] * 9, [False] * 5 + [True] * 4), Sample([1] * 8, [False] * 6 + [True] * 2)]
    for overlong, least in (("truncate", 5), ("drop", 7)):
        with pytest.raises(ConfigError, match=rf"recipe.seq_length=4 leaves none of 2 samples .* use {least} or more"):
            fit(data, seq_length=4, overlong=overlong)  # type: ignore[arg-type]
        assert len(fit(data, seq_length=least, overlong=overlong).samples) == 1  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="none has one"):
        fit([Sample([1, 1], [False, False])], seq_length=4, overlong="drop")


def test_sizes_that_do_not_come_out_even_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"recipe.global_batch_size=4 must be a multiple .* 1 x 3; use recipe.global_batch_size=3 "
    ):
        next(Batching(8, 1, 4, PAD).train(samples(3), 0, seed=0, dp_rank=0, dp_size=3))
    with pytest.raises(ConfigError, match=r"recipe.micro_batch_size=0 must be at least 1"):
        Batching(8, 0, 4, PAD)
    with pytest.raises(ConfigError, match=r"no sample to train on"):
        next(Batching(8, 1, 4, PAD).train([], 0, seed=0, dp_rank=0, dp_size=1))


def test_packed_rows_hold_every_document_once_within_its_own_bounds() -> None:
    batching = Batching(8, 2, 2, PAD, packing=True)
    data = samples(23, 8)
    rows = batching.rows(data, seed=3)
    assert len(rows) < len(data) * 0.75
    assert sorted(sample.tokens[0] for row in rows for sample in row) == [100 + number for number in range(23)]
    for row in rows:
        batch = batching.collate([row], 8)
        documents, positions, tokens = (batch[name][0].tolist() for name in ("documents", "position_ids", "tokens"))
        assert documents == sorted(documents)
        for number, sample in enumerate(row):
            places = [place for place, document in enumerate(documents) if document == number]
            assert [positions[place] for place in places] == list(range(len(places)))
            assert [tokens[place] for place in places] == list(sample.tokens[:-1])
            assert [batch["labels"][0, place] for place in places] == list(sample.tokens[1:])
        assert int(batch["loss_mask"].sum()) == sum(sum(sample.mask[1:]) for sample in row)
    assert batching.rows(data, seed=3) == rows != batching.rows(data, seed=4)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(0, 5))
def test_packs_fit_and_lose_nothing(lengths: list[int], seed: int) -> None:
    rows = pack(lengths, 20, seed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert max(sums) <= 20
    assert sum(sorted(sums)[:2]) > 20 or len(rows) == 1, "no two rows would fit into one"


def test_steps_of_grouped_samples_are_about_equally_long() -> None:
    data = samples(512, 40)
    grouped = Batching(40, 1, 4, PAD, pad_to="longest", group_by_length=True, row_rules=RowRules(is_common=True))
    plain = Batching(40, 1, 4, PAD, pad_to="longest", row_rules=RowRules(is_common=True))
    padding = {}
    for name, batching in (("grouped", grouped), ("plain", plain)):
        batches = list(islice(batching.train(data, 0, seed=2, dp_rank=0, dp_size=1), 512))
        learned = [row[0] for row in rows(batches)]
        assert sorted(learned) == sorted(sample.tokens[0] for sample in data)
        padding[name] = sum(batch["tokens"].numel() for batch in batches) - sum(sample.positions for sample in data)
    assert padding["grouped"] < padding["plain"] / 4
    through = list(islice(grouped.train(data, 0, seed=2, dp_rank=1, dp_size=2), 40))
    resumed = list(islice(grouped.train(data, 40, seed=2, dp_rank=1, dp_size=2), 20))
    assert rows(through[20:]) == rows(resumed)


def test_ways_of_filling_rows_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.packing=true fills rows"):
        Batching(8, 1, 1, PAD, packing=True, pad_to=4)
    with pytest.raises(ConfigError, match=r"data\.group_by_length=true saves nothing"):
        Batching(8, 1, 1, PAD, group_by_length=True)
    wrong: Any
    for wrong in ("longer", True, None):
        with pytest.raises(ConfigError, match=rf"data\.pad_to={wrong!r} must be longest, seq_length, or a number"):
            Batching(8, 1, 1, PAD, pad_to=wrong)
