"""From tokenised samples to batches: fitting to the sequence length, order, padding. The same on every rank."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch

from megabridge.data.module import Batch
from megabridge.errors import ConfigError

type Overlong = Literal["truncate", "drop"]
OVERLONG: Final = ("truncate", "drop")


@dataclass(frozen=True)
class Sample:
    """Tokens, and for each whether the model should learn to produce it."""

    tokens: Sequence[int]
    mask: Sequence[bool]


@dataclass
class Fitted:
    """Samples that fit `seq_length`, and what happened to the others."""

    samples: list[Sample] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    """Longer than the sequence length, and left out because of it."""
    unanswered: int = 0
    """Left out because nothing to learn was left of them."""

    def describe(self) -> str:
        tokens = sum(len(sample.tokens) for sample in self.samples)
        notes = [
            f"{count} {what}"
            for count, what in (
                (self.truncated, "truncated"),
                (self.dropped, "too long and left out"),
                (self.unanswered, "left out: no token of an answer within the sequence length"),
            )
            if count
        ]
        return f"{len(self.samples)} samples, {tokens} tokens" + (f" ({'; '.join(notes)})" if notes else "")


def fit(samples: Sequence[Sample], *, seq_length: int, overlong: Overlong) -> Fitted:
    """Cuts or leaves out samples of more than seq_length + 1 tokens (the last one is only a label), and counts them.

    Raises ConfigError when there are samples and none is left.
    """
    fitted = Fitted()
    limit = seq_length + 1
    for sample in samples:
        kept = sample
        is_long = len(sample.tokens) > limit
        if is_long and overlong == "drop":
            fitted.dropped += 1
            continue
        if is_long:
            kept = Sample(sample.tokens[:limit], sample.mask[:limit])
        if not any(kept.mask[1:]):
            fitted.unanswered += 1
            continue
        fitted.truncated += is_long
        fitted.samples.append(kept)
    if samples and not fitted.samples:
        rule = f"recipe.seq_length={seq_length} leaves none of {len(samples)} samples with an answer"
        answered = [sample for sample in samples if any(sample.mask[1:])]
        if not answered:
            raise ConfigError(f"{rule}: none has one; give each an assistant message.")
        lengths = [len(sample.tokens) - 1 if overlong == "drop" else sample.mask.index(True, 1) for sample in answered]
        raise ConfigError(f"{rule}; use {min(lengths)} or more.")
    return fitted


class Order:
    """An endless order over `count` samples: a new permutation each epoch, from (seed, epoch) alone."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def sample(self, position: int) -> int:
        """The sample at `position` >= 0 of the run."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._permutation = list(range(self.count))
            # random.Random, seeded by a string, shuffles alike in every version of Python; numpy promises no such thing.
            random.Random(f"{self.seed}/{epoch}").shuffle(self._permutation)
            self._epoch = epoch
        return self._permutation[place]


@dataclass(frozen=True)
class Batching:
    """Sizes of batches. Raises ConfigError where they don't come out even.

    `pad_to` None pads every row to seq_length. A number pads a step's rows to its longest one, rounded up to a multiple of it: the
    shape changes from step to step and is the same on all ranks. Under sequence parallelism it must be a multiple of tp.
    """

    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    pad_token: int
    pad_to: int | None = None

    def __post_init__(self) -> None:
        sizes = (
            ("recipe.seq_length", self.seq_length),
            ("recipe.micro_batch_size", self.micro_batch_size),
            ("recipe.global_batch_size", self.global_batch_size),
            ("data.pad_to", 1 if self.pad_to is None else self.pad_to),
        )
        for name, size in sizes:
            if size < 1:
                raise ConfigError(f"{name}={size} must be at least 1.")

    def length(self, samples: Sequence[Sample]) -> int:
        """The common length of the rows of `samples`."""
        if self.pad_to is None:
            return self.seq_length
        longest = max(len(sample.tokens) - 1 for sample in samples)
        return min(-(-longest // self.pad_to) * self.pad_to, self.seq_length)

    def train(self, samples: Sequence[Sample], consumed_samples: int, *, seed: int, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """See `DataModule.train_batches`."""
        if not samples:
            raise ConfigError("data has no sample to train on; add some.")
        step, micro = self.global_batch_size, self.micro_batch_size
        if step % (micro * dp_size):
            raise ConfigError(
                f"recipe.global_batch_size={step} must be a multiple of recipe.micro_batch_size x dp = {micro} x {dp_size}; "
                f"use {micro * dp_size * max(1, round(step / (micro * dp_size)))} or change either."
            )
        order = Order(len(samples), seed)
        begin = consumed_samples
        while True:
            chosen = [samples[order.sample(position)] for position in range(begin, begin + step)]
            length = self.length(chosen)
            for start in range(dp_rank * micro, step, dp_size * micro):
                yield self.collate(chosen[start : start + micro], length)
            begin += step

    def validation(self, samples: Sequence[Sample], *, dp_rank: int, dp_size: int) -> list[Batch]:
        """See `DataModule.validation_batches`; filled up with rows whose loss mask is zero throughout."""
        micro = self.micro_batch_size
        batches = -(-len(samples) // (micro * dp_size)) * dp_size
        return [
            self.collate(samples[number * micro : (number + 1) * micro], self.seq_length)
            for number in range(dp_rank, batches, dp_size)
        ]

    def collate(self, samples: Sequence[Sample], length: int) -> Batch:
        """[micro_batch_size, length] of up to micro_batch_size samples; rows that are missing have no loss."""
        shape = (self.micro_batch_size, length)
        tokens = torch.full(shape, self.pad_token, dtype=torch.long)
        labels = torch.full(shape, self.pad_token, dtype=torch.long)
        mask = torch.zeros(shape)
        for row, sample in enumerate(samples):
            ids = torch.tensor(sample.tokens, dtype=torch.long)
            count = len(ids) - 1
            tokens[row, :count] = ids[:-1]
            labels[row, :count] = ids[1:]
            mask[row, :count] = torch.tensor(sample.mask[1:], dtype=torch.float32)
        positions = torch.arange(length).repeat(self.micro_batch_size, 1)
        return {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
