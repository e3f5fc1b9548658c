"""Reads all rows of a source as samples. The ranks tokenise blocks of rows in turn, and every rank gets all samples."""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from megabridge.data.batches import Overlong, Sample, fit_one
from megabridge.data.examples import DIGEST, Examples
from megabridge.data.invalid_rows import BadRow, Tally
from megabridge.data.sources import Found
from megabridge.data.vocabulary import check_ids
from megabridge.errors import ConfigError
from megabridge.parallel.collectives import all_gather, all_gather_bytes, raise_together, rank, world_size

BLOCK: Final = 256
"""Consecutive rows that a rank tokenises between two exchanges."""
SECONDS: Final = 30.0
"""Seconds between lines that report progress."""


@dataclass
class Read:
    """The samples of rows, in order, and the tally of those that were left out."""

    samples: list[Sample] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """Digest of each sample's row."""
    tally: Tally = field(default_factory=Tally)
    truncated: int = 0

    def take(self, found: Found, examples: Examples, *, seq_length: int, overlong: Overlong) -> None:
        """Tokenises one row, or counts it as bad. Raises ConfigError for tokens outside the model's vocabulary."""
        where, row = found
        try:
            if isinstance(row, BadRow):
                raise row
            sample = examples.encode(row)
            kept = fit_one(sample, seq_length=seq_length, overlong=overlong)
        except BadRow as bad:
            self.tally.leave_out(where, bad)
            return
        check_ids(kept.tokens, examples.vocab_size, where)
        self.tally.good += 1
        self.truncated += len(kept.tokens) < len(sample.tokens)
        # An array takes a tenth of the memory of a list.
        self.samples.append(Sample(array("i", kept.tokens), bytes(kept.mask)))
        self.digests.append(examples.digest(row))

    def content(self) -> bytearray:
        """Returns the samples as bytes: all lengths (int32); then each one's digest, tokens (int32) and mask (a byte per token)."""
        lengths = array("i", [len(sample.mask) for sample in self.samples])
        pieces: list[Any] = [lengths]
        for digest, sample in zip(self.digests, self.samples, strict=True):
            pieces += [digest, sample.tokens, sample.mask]
        return bytearray().join(pieces)

    def add(self, content: bytearray, tally: Tally, truncated: int) -> None:
        """Appends the rows that another rank read next, given by their `content`, `tally` and `truncated`."""
        self.tally.add(tally)
        self.truncated += truncated
        lengths, rest = _ints(memoryview(content), tally.good)
        for length in lengths:
            self.digests.append(bytes(rest[:DIGEST]))
            tokens, rest = _ints(rest[DIGEST:], length)
            self.samples.append(Sample(tokens, bytes(rest[:length])))
            rest = rest[length:]


def _ints(content: memoryview, count: int) -> tuple[array[int], memoryview]:
    """Returns (the first `count` int32, the rest)."""
    ints = array("i")
    end = ints.itemsize * count
    ints.frombytes(content[:end])
    return ints, content[end:]


def read(rows: Iterable[Found], examples: Examples, *, seq_length: int, overlong: Overlong, what: str) -> Read:
    """Returns all of `rows`, tokenised by `examples` and fitted by `fit_one`; the same on every rank, whatever their number.

    Collective. Every rank reads all rows, which costs little compared with tokenising them. An error on one rank is raised on all,
    before the next blocks. Raises ConfigError where ranks find different numbers of rows; `what` names the source in errors.
    """
    whole, remaining, own, stride = Read(), iter(rows), rank(), BLOCK * world_size()
    reported, begun, before = time.monotonic(), time.monotonic(), 0
    while True:
        part, seen = Read(), 0
        with raise_together(f"reading {what}"):
            for found in islice(remaining, stride):
                if seen // BLOCK == own:
                    part.take(found, examples, seq_length=seq_length, overlong=overlong)
                else:
                    examples.settle(found[1])
                seen += 1
        parts = all_gather((seen, part.tally, part.truncated))
        _check([count for count, _, _ in parts], before, stride, what)
        for content, (_, tally, truncated) in zip(all_gather_bytes(part.content()), parts, strict=True):
            whole.add(content, tally, truncated)
        before += seen
        if seen < stride:
            return whole
        if own == 0 and time.monotonic() - reported >= SECONDS:
            reported = time.monotonic()
            print(f"{what}: {before} rows tokenised in {reported - begun:.0f} s", file=sys.stderr, flush=True)


def _check(counts: Sequence[int], before: int, stride: int, what: str) -> None:
    """Raises ConfigError unless all ranks' `counts` of rows after the first `before` are equal; at `stride`, more may follow."""
    for number, count in enumerate(counts):
        if count != counts[0]:
            first, other = (f"{before + found}{' or more' if found == stride else ''}" for found in (counts[0], count))
            raise ConfigError(f"{what} has {first} rows on rank 0 but {other} on rank {number}; give every host the same files.")
