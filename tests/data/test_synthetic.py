"""Random tokens."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from megabridge.data.synthetic import RandomTokens
from megabridge.errors import ConfigError


def test_rows_are_full_in_range_and_the_same_for_a_seed() -> None:
    def first(seed: int) -> torch.Tensor:
        data = RandomTokens(vocab_size=7, samples=6, validation_samples=3)
        data.setup(Path(), seq_length=16, micro_batch_size=2, global_batch_size=4, seed=seed)
        batches = list(islice(data.train_batches(0, dp_rank=0, dp_size=1), 3))
        assert all(batch["loss_mask"].all() and int(batch["tokens"].max()) < 7 for batch in batches)
        assert all(torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1]) for batch in batches)
        assert sum(int(batch["loss_mask"].sum()) for batch in data.validation_batches(dp_rank=0, dp_size=1)) == 3 * 16
        return torch.cat([batch["tokens"] for batch in batches])

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.samples=0 must be at least 1"):
        RandomTokens(vocab_size=7, samples=0)


def test_more_tokens_than_a_host_holds(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.samples=1000000000000 and .* but at most 268435456 may be held in memory; use fewer"
    ):
        RandomTokens(vocab_size=9, samples=10**12).setup(tmp_path, seq_length=8, micro_batch_size=1, global_batch_size=1, seed=0)
