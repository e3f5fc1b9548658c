"""Pretraining on indexed data: windows over shuffled documents, blended from several sets.

The seed and the position in the run determine each row, which is found without computing those before it: resuming costs nothing,
and no index is built or cached. megatron-core's GPTDataset gives other rows, which also depend on the run's length.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, override

import numpy as np
from numpy.typing import NDArray

from megabridge.data import digests
from megabridge.data.batches import Batching, Row, text_row
from megabridge.data.indexed import Indexed
from megabridge.data.module import Batch, DataModule
from megabridge.data.vocabulary import check_ids
from megabridge.errors import ConfigError, listed
from megabridge.storage import data_files

_BLOCK: Final = 4096
"""Positions that are assigned to sets at once."""


class TokenWindows:
    """Windows of seq_length + 1 tokens over some documents of one set, concatenated in a new order each epoch.

    A window begins with the last token of the one before it, so that every token but an epoch's first is a label; the remainder at
    the end of an epoch, less than a window, is left out.
    """

    def __init__(self, indexed: Indexed, documents: range, seq_length: int, seed: str, vocab_size: int | None = None) -> None:
        self._indexed, self._documents, self._length, self._seed = indexed, documents, seq_length, seed
        self._vocab_size = vocab_size
        self._sizes = indexed.lengths[documents.start : documents.stop]
        self.tokens = int(self._sizes.sum())
        self.per_epoch = max(0, self.tokens - 1) // seq_length
        self._epoch = -1

    def window(self, number: int) -> list[NDArray[np.int64]]:
        """Returns window `number` >= 0 of the run: seq_length + 1 tokens, in pieces of one document each.

        Raises ConfigError for tokens that are not below `vocab_size`.
        """
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._shuffle(epoch)
        begin = int(self._order[place]) * self._length
        end = begin + self._length + 1
        found = []
        which = int(np.searchsorted(self._ends, begin, "right"))
        while begin < end:
            first = int(self._ends[which] - self._sizes[self._shuffled[which]])
            stop = min(end, int(self._ends[which]))
            if stop > begin:
                document = self._documents[int(self._shuffled[which])]
                piece = self._indexed.tokens(document, begin - first, stop - first)
                if self._vocab_size is not None and not (piece.min() >= 0 and piece.max() < self._vocab_size):
                    check_ids(piece.tolist(), self._vocab_size, f"data.paths: document {document} of {self._indexed.prefix}")
                found.append(piece)
            begin, which = stop, which + 1
        return found

    def _shuffle(self, epoch: int) -> None:
        # RandomState's stream is frozen (NEP 19): it is the same in every version of numpy, unlike Generator's.
        words = np.frombuffer(hashlib.sha256(f"{self._seed}/{epoch}".encode()).digest(), np.uint32)
        random = np.random.RandomState(words)
        self._shuffled = random.permutation(len(self._sizes))
        self._ends = np.cumsum(self._sizes[self._shuffled])
        self._order = random.permutation(self.per_epoch)
        self._epoch = epoch


class Blend:
    """Assigns positions to sets by weights, so that after n rows every set is within about a row of its share.

    Row i of a set with weight w has the time (i + 1/2) / w; rows come in the order of their times.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = np.asarray(weights, np.float64) / np.sum(weights)
        self._block = -1
        self._found: list[tuple[int, int]] = []

    def place(self, position: int) -> tuple[int, int]:
        """Returns (set, row of the set) at `position` >= 0."""
        block, offset = divmod(position, _BLOCK)
        if block != self._block:
            self._found, self._block = self._rows(block * _BLOCK), block
        return self._found[offset]

    def _rows(self, begin: int) -> list[tuple[int, int]]:
        sets = len(self.weights)
        earliest = max(0.0, begin - sets)
        # Rows of each set up to a time: until `earliest` at most `begin` in total, until the later time at least the whole block.
        before = self._until(earliest)
        until = self._until(begin + _BLOCK + sets)
        times, which, rows = [], [], []
        for number, weight in enumerate(self.weights):
            own = np.arange(before[number], until[number])
            times.append((own + 0.5) / weight)
            which.append(np.full(len(own), number))
            rows.append(own)
        order = np.lexsort((np.concatenate(which), np.concatenate(times)))
        chosen = order[begin - int(before.sum()) :][:_BLOCK]
        pairs = zip(np.concatenate(which)[chosen].tolist(), np.concatenate(rows)[chosen].tolist(), strict=True)
        return list(pairs)

    def _until(self, time: float) -> NDArray[np.int64]:
        """Returns for each set the number of rows whose time is at most `time`."""
        rows: NDArray[np.int64] = np.floor(self.weights * time + 0.5).astype(np.int64)
        return rows


class IndexedTokens(DataModule):
    """Data of rows of recipe.seq_length tokens, all of them learned, from one or several prefixes of indexed data."""

    def __init__(
        self,
        *,
        paths: Sequence[str],
        weights: Sequence[float] | None = None,
        split: Sequence[float] = (0.99, 0.01),
        separate_documents: bool = False,
        validation_samples: int = 64,
    ) -> None:
        """`weights`: shares of `paths` in the rows, by default proportional to their tokens. `split`: shares of each path's
        documents for training and validation, in file order; a third share (a test set) is not used. `separate_documents`: whether
        a token attends to its own document only. `validation_samples`: maximum number of validation rows. Raises ConfigError.
        """
        problems = []
        if not paths:
            problems.append("data.paths must name at least one prefix of .bin and .idx; set it.")
        if weights is not None and not (len(weights) == len(paths) and min(weights, default=0) > 0 and math.isfinite(sum(weights))):
            problems.append(f"data.weights={list(weights)} must be {len(paths)} positive numbers, one for each of data.paths.")
        if not (1 <= len(split) <= 3 and min(split) >= 0 and split[0] > 0 and math.isfinite(sum(split))):
            problems.append(f"data.split={list(split)} must be 1 to 3 shares for train, validation, test, the first above 0.")
        if validation_samples < 0:
            problems.append(f"data.validation_samples={validation_samples} must be at least 0.")
        if problems:
            raise ConfigError(listed(problems))
        self._paths, self._weights, self._split = list(paths), weights, list(split)
        self._separate, self._most = separate_documents, validation_samples

    @override
    def setup(self, tokenizer_folder: Path, *, seq_length: int, micro_batch_size: int, global_batch_size: int, seed: int) -> None:
        """Opens the indexed data; the tokenizer isn't used."""
        self._batching = Batching(seq_length, micro_batch_size, global_batch_size, 0, packing=self._separate)
        sets = [Indexed(path) for path in self._paths]
        self._train = [
            TokenWindows(indexed, parts[0], seq_length, f"{seed}/{number}/train", self.vocab_size)
            for number, indexed in enumerate(sets)
            for parts in [split_documents(len(indexed), self._split)]
        ]
        short = [path for path, windows in zip(self._paths, self._train, strict=True) if not windows.per_epoch]
        if short:
            raise ConfigError(
                f"data.paths: {', '.join(short)} must have more than recipe.seq_length={seq_length} tokens to train on."
            )
        self._blend = Blend([windows.tokens for windows in self._train] if self._weights is None else self._weights)
        held_out = [
            TokenWindows(
                indexed, split_documents(len(indexed), self._split)[1], seq_length, f"{seed}/{number}/validation", self.vocab_size
            )
            for number, indexed in enumerate(sets)
        ]
        self._validation = self._held_out(held_out)

    def _held_out(self, sets: Sequence[TokenWindows]) -> list[Row]:
        """Returns rows of the held-out documents, blended like those for training, none twice."""
        shares = [(windows, weight) for windows, weight in zip(sets, self._blend.weights, strict=True) if windows.per_epoch]
        if not shares:
            return []
        blend = Blend([weight for _, weight in shares])
        rows: list[Row] = []
        while len(rows) < self._most:
            which, number = blend.place(len(rows))
            if number >= shares[which][0].per_epoch:
                break
            rows.append(self._row(shares[which][0].window(number)))
        return rows

    def _row(self, pieces: Sequence[NDArray[np.int64]]) -> Row:
        return text_row([piece.tolist() for piece in pieces], separate=self._separate)

    def _train_row(self, position: int) -> Row:
        which, number = self._blend.place(position)
        return self._row(self._train[which].window(number))

    @override
    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        return self._batching.steps(self._train_row, consumed_samples, dp_rank=dp_rank, dp_size=dp_size)

    @override
    def validation_batches(self, *, dp_rank: int, dp_size: int) -> list[Batch]:
        return self._batching.fixed(self._validation, dp_rank=dp_rank, dp_size=dp_size)

    @override
    def epoch_rows(self) -> int:
        """As many as all sets have, whatever their weights."""
        return sum(windows.per_epoch for windows in self._train)

    @override
    def digest(self) -> str:
        return digests.of_files([file for path in self._paths for file in data_files.indexed_files(path)])

    @override
    def describe(self) -> str:
        parts = [
            f"{path} ({weight:.1%}, {windows.tokens} tokens)"
            for path, weight, windows in zip(self._paths, self._blend.weights, self._train, strict=True)
        ]
        train = f"train {self.epoch_rows()} rows an epoch of {', '.join(parts)}"
        return f"indexed tokens: {train}; validation {len(self._validation)} rows"


def split_documents(count: int, shares: Sequence[float]) -> list[range]:
    """Divides `count` documents into training, validation and test, in file order; ends are rounded as in megatron-core."""
    ends = [round(float(end)) for end in np.cumsum([*shares, 0, 0][:3]) / np.sum(shares) * count]
    return [range(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
