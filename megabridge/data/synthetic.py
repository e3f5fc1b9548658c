"""Random tokens, for smoke tests and speed measurements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, override

import torch

from megabridge.data.batches import Batching, Sample
from megabridge.data.module import Batch, DataModule
from megabridge.data.vocabulary import check_ids
from megabridge.errors import ConfigError

MOST: Final = 1 << 28
"""Maximum number of tokens."""


class RandomTokens(DataModule):
    """Data of `samples` random rows of seq_length + 1 tokens, uniform over `vocab_size` ids, all of them learned."""

    def __init__(self, *, vocab_size: int, samples: int = 256, validation_samples: int = 8) -> None:
        for name, value in (("vocab_size", vocab_size), ("samples", samples), ("validation_samples", validation_samples)):
            if value < 1:
                raise ConfigError(f"data.{name}={value} must be at least 1.")
        self._vocab_size = vocab_size
        self._counts = (samples, validation_samples)

    @override
    def setup(self, tokenizer_folder: Path, *, seq_length: int, micro_batch_size: int, global_batch_size: int, seed: int) -> None:
        """Makes the rows; the tokenizer isn't used."""
        check_ids([self._vocab_size - 1], self.vocab_size, f"data.vocab_size={self._vocab_size}")
        self._seed = seed
        self._batching = Batching(seq_length, micro_batch_size, global_batch_size, pad_token=0)
        count, held_out = self._counts
        if (tokens := (count + held_out) * (seq_length + 1)) > MOST:
            raise ConfigError(
                f"data.samples={count} and data.validation_samples={held_out} of {seq_length + 1} tokens are {tokens}, but at most "
                f"{MOST} may be held in memory; use fewer."
            )
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(self._vocab_size, (count + held_out, seq_length + 1), generator=generator).tolist()
        samples = [Sample(row, [True] * len(row)) for row in rows]
        self._train, self._validation = samples[:count], samples[count:]

    @override
    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        return self._batching.train(self._train, consumed_samples, seed=self._seed, dp_rank=dp_rank, dp_size=dp_size)

    @override
    def validation_batches(self, *, dp_rank: int, dp_size: int) -> list[Batch]:
        return self._batching.validation(self._validation, dp_rank=dp_rank, dp_size=dp_size)

    @override
    def describe(self) -> str:
        return (
            f"random tokens: train {self._counts[0]} samples, validation {self._counts[1]}, of {self._batching.seq_length} tokens"
        )
