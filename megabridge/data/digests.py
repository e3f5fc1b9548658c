"""Digests of a run's data, compared when it is resumed."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import xxhash

from megabridge.data.batches import Sample
from megabridge.parallel.collectives import distribute
from megabridge.storage import regular_files

WHOLE: Final = 4 << 30
"""Bytes of files up to which all are read; of larger ones evenly spread pieces, WHOLE bytes in total."""
_PIECE: Final = 1 << 20


def of_samples(*groups: Iterable[Sample]) -> str:
    """Returns the digest of groups of samples (train, validation), in order: of their tokens and masks."""
    digest = xxhash.xxh3_128()
    for number, group in enumerate(groups):
        digest.update(f"group {number} ".encode())
        for sample in group:
            tokens = sample.tokens if isinstance(sample.tokens, array) else array("i", sample.tokens)
            digest.update(f"{len(tokens)} ".encode())
            digest.update(tokens.tobytes())
            digest.update(bytes(sample.mask))
    return digest.hexdigest()


def of_files(files: Sequence[Path]) -> str:
    """Returns the digest of files in order: of their sizes and bytes. Every rank reads a part. Collective.

    Raises CheckpointError for a file that can't be read.
    """
    sizes = [file.stat().st_size for file in files]
    pieces = [(file, begin) for file, size in zip(files, sizes, strict=True) for begin in range(0, size, _PIECE)]
    most = WHOLE // _PIECE
    if len(pieces) > most:
        pieces = [pieces[number * (len(pieces) - 1) // (most - 1)] for number in range(most)]

    def work(number: int) -> str:
        file, begin = pieces[number]
        with regular_files.opened(file) as stream:
            stream.seek(begin)
            return xxhash.xxh3_128_hexdigest(stream.read(_PIECE))

    found = distribute("reading what the run learns from", len(pieces), work)
    return xxhash.xxh3_128_hexdigest(f"{sizes} {' '.join(found)}".encode())
