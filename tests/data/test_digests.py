"""What a run learns from has another digest as soon as one row is another."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import pytest

from megabridge.data import digests, indexed
from megabridge.data.batches import Sample
from megabridge.data.pretraining import IndexedTokens


def test_samples() -> None:
    rows = [Sample([1, 2, 3], [False, True, True]), Sample([4, 5], [True, True])]
    base = digests.of_samples(rows, [])
    assert digests.of_samples([Sample(array("i", row.tokens), bytes(row.mask)) for row in rows], []) == base
    others = {
        digests.of_samples(rows[::-1], []),
        digests.of_samples(rows[:1], rows[1:]),
        digests.of_samples([Sample([1, 2, 3], [True] * 3), rows[1]], []),
        digests.of_samples([Sample([1, 2, 4], [False, True, True]), rows[1]], []),
        digests.of_samples([Sample([1, 2, 3, 4, 5], [False, True, True, True, True])], []),
    }
    assert len(others) == 5 and base not in others


def test_files_of_indexed_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexed.write(tmp_path / "data", [[number % 60] * 50_000 for number in range(30)], 61)
    content = tmp_path / "data.bin"
    data, stamp = IndexedTokens(paths=[str(tmp_path / "data")]), content.stat()
    base = data.digest()
    assert IndexedTokens(paths=[str(content)]).digest() == base
    before = content.read_bytes()
    for place in (len(before) - 1, len(before) // 2 + 1, 0):
        spoilt = bytearray(before)
        spoilt[place] ^= 1
        content.write_bytes(spoilt)
        os.utime(content, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert data.digest() != base
    monkeypatch.setattr(digests, "WHOLE", 2 << 20)  # the first piece, the index, and all sizes
    ends = data.digest()
    content.write_bytes(before)
    assert data.digest() not in (base, ends)
    content.write_bytes(before + b"\0\0")
    assert data.digest() not in (base, ends)
