"""Pretraining on a data set that `datasets` streams during training: nothing is downloaded or tokenised beforehand.

Every rank reads the whole stream and takes its own rows of it, so that the order doesn't depend on the number of ranks; a resumed
run reads the stream again up to its position. Indexed data costs neither: use this for data too large to keep, or for a first look.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, override

from megabridge.data import digests, sources
from megabridge.data.batches import Batching, Row, text_row
from megabridge.data.examples import Examples
from megabridge.data.invalid_rows import SOON, BadRow, Tally, check_share
from megabridge.data.module import Batch, DataModule
from megabridge.data.vocabulary import check_ids
from megabridge.errors import ConfigError, listed
from megabridge.storage import data_files


class StreamedText(DataModule):
    """Data of rows of recipe.seq_length tokens, all of them learned, cut out of consecutive documents.

    With `separate_documents` a token attends to its own document only. The first `validation_documents` of the stream are held out,
    unless `validation_split` names another part of the data set.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        column: str = "text",
        shuffle_buffer: int = 1000,
        separate_documents: bool = False,
        validation_split: str | None = None,
        validation_documents: int = 100,
        validation_samples: int = 64,
        max_bad_share: float = 0.01,
    ) -> None:
        """`shuffle_buffer`: number of documents among which the next one is chosen; 0 keeps the order. Raises ConfigError."""
        sizes = {
            "shuffle_buffer": shuffle_buffer,
            "validation_documents": validation_documents,
            "validation_samples": validation_samples,
        }
        problems = [f"data.{key}={size} must be at least 0." for key, size in sizes.items() if size < 0]
        if problems:
            raise ConfigError(listed(problems))
        check_share(max_bad_share)
        self._source = {"name": name, "revision": revision}
        self._path, self._split, self._column = path, split, column
        self._buffer, self._separate, self._max_bad_share = shuffle_buffer, separate_documents, max_bad_share
        self._validation_split, self._held_out = validation_split, validation_documents if validation_split is None else 0
        self._held_out_rows, self._documents = validation_samples, validation_documents
        self.tally = Tally()
        """Tally of the rows read for training so far."""

    @override
    def setup(self, tokenizer_folder: Path, *, seq_length: int, micro_batch_size: int, global_batch_size: int, seed: int) -> None:
        """Reads the documents that are held out."""
        self._examples = Examples(
            tokenizer_folder,
            schema="text",
            columns={"text": self._column},
            prompt_as_chat=False,
            template_arguments=None,
            vocab_size=self.vocab_size,
        )
        self._seed = seed
        self._batching = Batching(seq_length, micro_batch_size, global_batch_size, self._examples.pad_token, packing=self._separate)
        self._unusable = Tally()
        stream = self._load(self._validation_split or self._split).take(self._documents)
        documents = self._documents_of(stream, "validation", self._unusable)
        self._validation = list(itertools.islice(self._rows(documents), self._held_out_rows))
        if self._unusable.rows:
            self._unusable.judge(self._max_bad_share, f"data.path={self._path}")

    def _load(self, split: str) -> Any:
        files = data_files.local_files(self._path)
        if files is None:
            return sources.load(self._path, split=split, streaming=True, **self._source)
        return sources.stream_files(files)

    def _documents_of(self, stream: Any, what: str, tally: Tally) -> Iterator[list[int]]:
        """Yields the tokens of each document; counts bad rows, and checks their share once SOON rows were seen."""
        for number, row in enumerate(sources.readable(self._path, stream)):
            where = f"{self._path}:{what} row {number}"
            try:
                sample = self._examples.encode(row)
            except BadRow as bad:
                tally.leave_out(where, bad)
                if tally.rows >= SOON:
                    tally.judge(self._max_bad_share, f"data.path={self._path}")
                continue
            check_ids(sample.tokens, self.vocab_size, where)
            tally.good += 1
            yield list(sample.tokens)

    def _rows(self, documents: Iterator[list[int]]) -> Iterator[Row]:
        """Yields windows of seq_length + 1 tokens; each begins with the last token of the one before it."""
        length = self._batching.seq_length
        pieces: list[list[int]] = []
        held = 0
        for document in documents:
            pieces.append(document)
            held += len(document)
            while held > length:
                window, pieces = _cut(pieces, length)
                held -= length
                yield text_row(window, separate=self._separate)

    def _train_rows(self) -> Iterator[Row]:
        """Yields rows endlessly: the stream is repeated, shuffled anew each time."""
        return self._rows(document for epoch in itertools.count() for document in self._epoch(epoch))

    def _epoch(self, epoch: int) -> Iterator[list[int]]:
        stream = self._load(self._split).skip(self._held_out)
        if self._buffer:
            stream = stream.shuffle(seed=self._seed, buffer_size=self._buffer)
            stream.set_epoch(epoch)
        before = self.tally.rows
        yield from self._documents_of(stream, self._split, self.tally)
        if self.tally.rows == before:
            raise ConfigError(f"data.path={self._path} has no document besides those held out; lower data.validation_documents.")
        self.tally.judge(self._max_bad_share, f"data.path={self._path}")

    @override
    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        rows = _Forward(self._train_rows())
        return self._batching.steps(rows.at, consumed_samples, dp_rank=dp_rank, dp_size=dp_size)

    @override
    def validation_batches(self, *, dp_rank: int, dp_size: int) -> list[Batch]:
        return self._batching.fixed(self._validation, dp_rank=dp_rank, dp_size=dp_size)

    @override
    def digest(self) -> str:
        """Returns the digest of the held-out rows and of local files; the rows of a hub's data set follow from its revision."""
        local = data_files.local_files(self._path)
        held_out = digests.of_samples(*self._validation)
        return held_out if local is None else f"{held_out} {digests.of_files(local)}"

    @override
    def describe(self) -> str:
        parts = [f"{self._path}: streamed; validation {len(self._validation)} rows"]
        return "; ".join([*parts, self._unusable.describe()] if self._unusable.bad else parts)

    @override
    def left_out(self) -> str:
        return f"{self._path}: {self.tally.describe()}" if self.tally.bad else ""


class _Forward:
    """Access to rows of a stream by position; positions must increase."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows, self._next = rows, 0

    def at(self, position: int) -> Row:
        assert position >= self._next
        for _ in range(position - self._next):
            next(self._rows)
        self._next = position + 1
        return next(self._rows)


def _cut(pieces: list[list[int]], length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns (the first length + 1 tokens, the tokens from number `length` on), in their pieces."""
    window: list[list[int]] = []
    wanted = length + 1
    for number, piece in enumerate(pieces):
        window.append(piece[:wanted])
        if wanted <= len(piece):
            return window, [piece[wanted - 1 :], *pieces[number + 1 :]]
        wanted -= len(piece)
    raise AssertionError("the caller has more than `length` tokens")
