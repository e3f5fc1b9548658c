"""Makes batches of tokenised samples: fitting to the sequence length, order, padding. The result is the same on every rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch

from megabridge.config.layout_rules import batch_problems
from megabridge.data.invalid_rows import TOO_LONG, UNANSWERED, BadRow
from megabridge.data.module import Batch
from megabridge.data.packing import pack
from megabridge.errors import ConfigError, listed

type Overlong = Literal["truncate", "drop"]
OVERLONG: Final = ("truncate", "drop")


@dataclass(frozen=True)
class Sample:
    """Tokens, and for each whether the model learns to produce it."""

    tokens: Sequence[int]
    mask: Sequence[int]
    """1 or True where the token is learned."""

    @property
    def positions(self) -> int:
        """Positions that it takes in a row: the last token is only a label."""
        return len(self.tokens) - 1


type Row = Sequence[Sample]
"""Samples that follow each other in a row of a batch; without packing a single one."""


def text_row(pieces: Sequence[Sequence[int]], *, separate: bool) -> Row:
    """Returns pieces of documents as one sample, or with `separate` as one each, with all tokens learned.

    A sample of a single token has no label and is left out.
    """
    parts = pieces if separate else [[token for piece in pieces for token in piece]]
    return [Sample(part, b"\1" * len(part)) for part in parts if len(part) > 1]


@dataclass
class Fitted:
    """Samples that fit `seq_length`, and how many were truncated or left out."""

    samples: list[Sample] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    """Left out because they are longer than the sequence length."""
    unanswered: int = 0
    """Left out because no learned token is within the sequence length."""

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


def fit_one(sample: Sample, *, seq_length: int, overlong: Overlong) -> Sample:
    """Returns the sample, truncated to seq_length + 1 tokens (the last one is only a label) if `overlong` allows it.

    Raises BadRow where it is too long, or where no learned token is left.
    """
    limit = seq_length + 1
    kept = sample
    if len(sample.tokens) > limit:
        if overlong == "drop":
            raise BadRow(TOO_LONG, f"{len(sample.tokens)} tokens, recipe.seq_length={seq_length} takes {limit}")
        kept = Sample(sample.tokens[:limit], sample.mask[:limit])
    if not any(kept.mask[1:]):
        raise BadRow(UNANSWERED, f"of {len(sample.tokens)} tokens")
    return kept


def fit(samples: Sequence[Sample], *, seq_length: int, overlong: Overlong) -> Fitted:
    """Fits every sample by `fit_one` and counts those that are left out.

    Raises ConfigError when all samples are left out.
    """
    fitted = Fitted()
    for sample in samples:
        try:
            kept = fit_one(sample, seq_length=seq_length, overlong=overlong)
        except BadRow as row:
            fitted.dropped += row.kind == TOO_LONG
            fitted.unanswered += row.kind == UNANSWERED
            continue
        fitted.truncated += len(kept.tokens) < len(sample.tokens)
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
    """An endless order of `count` samples: a new permutation each epoch, determined by (seed, epoch) alone."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def sample(self, position: int) -> int:
        """Returns the sample at `position` >= 0 of the run."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._permutation = list(range(self.count))
            # random.Random, seeded by a string, shuffles the same in every version of Python; numpy doesn't promise that.
            random.Random(f"{self.seed}/{epoch}").shuffle(self._permutation)
            self._epoch = epoch
        return self._permutation[place]


class LengthOrder:
    """The order of `Order`, rearranged within blocks of GROUPS steps, so that the samples of a step are about equally long.

    Every sample still comes once an epoch and stays within its block of steps; the steps of a block come in a random order.
    """

    GROUPS: Final = 64

    def __init__(self, lengths: Sequence[int], seed: int, step: int) -> None:
        """`lengths` are the samples' lengths in tokens, `step` is the number of samples in a step."""
        self._order, self._lengths, self._step, self._seed = Order(len(lengths), seed), lengths, step, seed
        self._block = -1
        self._samples: list[int] = []

    def sample(self, position: int) -> int:
        """Returns the sample at `position` >= 0 of the run."""
        block, place = divmod(position, self.GROUPS * self._step)
        if block != self._block:
            begin = block * self.GROUPS * self._step
            found = [self._order.sample(begin + offset) for offset in range(self.GROUPS * self._step)]
            found.sort(key=self._lengths.__getitem__)
            groups = [found[first : first + self._step] for first in range(0, len(found), self._step)]
            random.Random(f"{self._seed}/lengths/{block}").shuffle(groups)
            self._samples = [sample for group in groups for sample in group]
            self._block = block
        return self._samples[place]


@dataclass(frozen=True)
class Batching:
    """Makes batches of the given sizes. Raises ConfigError for sizes and options that don't fit together.

    With `pad_to` None every row is padded to seq_length. Otherwise a step's rows are padded to its longest one, rounded up to a
    multiple of `pad_to`: the shape changes from step to step and is the same on all ranks. Under sequence parallelism `pad_to` must
    be a multiple of tp. `group_by_length` puts samples of about the same length into a step, which saves padding. With `packing` a
    row holds as many samples as fit, and a step's global_batch_size counts rows.
    """

    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    pad_token: int
    pad_to: int | None = None
    packing: bool = False
    group_by_length: bool = False

    def __post_init__(self) -> None:
        sizes = (
            ("recipe.seq_length", self.seq_length),
            ("recipe.micro_batch_size", self.micro_batch_size),
            ("recipe.global_batch_size", self.global_batch_size),
            ("data.pad_to", 1 if self.pad_to is None else self.pad_to),
        )
        problems = [f"{name}={size} must be at least 1." for name, size in sizes if size < 1]
        if self.packing and (self.pad_to is not None or self.group_by_length):
            problems.append("data.packing=true fills rows up to recipe.seq_length; remove data.pad_to and data.group_by_length.")
        elif self.group_by_length and self.pad_to is None:
            problems.append("data.group_by_length=true saves nothing where all rows are padded alike; set data.pad_to, e.g. 64.")
        if problems:
            raise ConfigError(listed(problems))

    def length(self, rows: Sequence[Row]) -> int:
        """Returns the length in tokens to which `rows` are padded."""
        if self.pad_to is None:
            return self.seq_length
        longest = max(sum(sample.positions for sample in row) for row in rows)
        return min(-(-longest // self.pad_to) * self.pad_to, self.seq_length)

    def rows(self, samples: Sequence[Sample], seed: int) -> Sequence[Row]:
        """Returns the rows of an epoch, before they are ordered."""
        if not self.packing:
            return [(sample,) for sample in samples]
        packs = pack([sample.positions for sample in samples], self.seq_length, seed)
        return [tuple(samples[index] for index in row) for row in packs]

    def train(self, samples: Sequence[Sample], consumed_samples: int, *, seed: int, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """See `DataModule.train_batches`."""
        if not samples:
            raise ConfigError("data has no sample to train on; add some.")
        rows = self.rows(samples, seed)
        order: Order | LengthOrder = Order(len(rows), seed)
        if self.group_by_length:
            order = LengthOrder([row[0].positions for row in rows], seed, self.global_batch_size)
        return self.steps(lambda position: rows[order.sample(position)], consumed_samples, dp_rank=dp_rank, dp_size=dp_size)

    def steps(self, row: Callable[[int], Row], consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """Like `train`, over the endless rows row(0), row(1), ... of the whole run. Raises ConfigError at the call."""
        step, micro = self.global_batch_size, self.micro_batch_size
        if problems := batch_problems(step, micro, dp_size):
            raise ConfigError(listed(problems))
        return self._steps(row, consumed_samples, dp_rank * micro, dp_size * micro)

    def _steps(self, row: Callable[[int], Row], begin: int, first: int, stride: int) -> Iterator[Batch]:
        step, micro = self.global_batch_size, self.micro_batch_size
        while True:
            starts = range(first, step, stride)
            if self.pad_to is None:  # then only this rank's rows are needed
                for start in starts:
                    yield self.collate([row(begin + start + number) for number in range(micro)], self.seq_length)
            else:
                rows = [row(begin + number) for number in range(step)]
                length = self.length(rows)
                for start in starts:
                    yield self.collate(rows[start : start + micro], length)
            begin += step

    def validation(self, samples: Sequence[Sample], *, dp_rank: int, dp_size: int) -> list[Batch]:
        """See `DataModule.validation_batches`; the last batches are filled up with rows whose loss mask is all zero."""
        return self.fixed(self.rows(samples, 0), dp_rank=dp_rank, dp_size=dp_size)

    def fixed(self, rows: Sequence[Row], *, dp_rank: int, dp_size: int) -> list[Batch]:
        """Like `validation`, for rows instead of samples."""
        micro = self.micro_batch_size
        batches = -(-len(rows) // (micro * dp_size)) * dp_size
        return [
            self.collate(rows[number * micro : (number + 1) * micro], self.seq_length)
            for number in range(dp_rank, batches, dp_size)
        ]

    def collate(self, rows: Sequence[Row], length: int) -> Batch:
        """Returns a batch [micro_batch_size, length] of up to micro_batch_size rows; missing rows have no loss."""
        shape = (self.micro_batch_size, length)
        tokens = torch.full(shape, self.pad_token, dtype=torch.long)
        labels = torch.full(shape, self.pad_token, dtype=torch.long)
        mask = torch.zeros(shape)
        documents = torch.zeros(shape, dtype=torch.long)
        positions = torch.arange(length).repeat(self.micro_batch_size, 1)
        for number, row in enumerate(rows):
            begin = 0
            for document, sample in enumerate(row):
                end = begin + sample.positions
                ids = torch.tensor(sample.tokens, dtype=torch.long)
                tokens[number, begin:end] = ids[:-1]
                labels[number, begin:end] = ids[1:]
                mask[number, begin:end] = torch.tensor(list(sample.mask[1:]), dtype=torch.float32)
                # Whatever follows belongs to the next document, or is padding, which gets a number of its own.
                documents[number, end:] = document + 1
                if self.packing:
                    positions[number, end:] = torch.arange(length - end)
                begin = end
        batch = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
        return {**batch, "documents": documents} if self.packing else batch
