"""100,000 mutants of headers and indexes: refused by name, or they mean what an independent reading says they mean."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from megabridge.errors import CheckpointError
from megabridge.hf import tensor_files
from megabridge.hf.safetensors_format import build_header, parse_header
from megabridge.hf.tensor_files import find_tensors, parse_index

SEED: Final = int(os.environ.get("MEGABRIDGE_MUTANT_SEED", "0"))
HEADERS: Final = 70_000
INDEXES: Final = 30_000
FILE: Final = Path("folder/model.safetensors")
SIZES: Final = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
TOKENS: Final = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-1", b"1e3", b"18446744073709551616", b"null", b"true", b"NaN", b'"F32"', b'"a"', b"\\u0000", b"\xff", b" ", b"", b"[[[[", b"../", b'"shape"']  # fmt: skip
ENTRIES: Final = [
    ("a", torch.float32, (4, 4)),
    ("b.weight", torch.bfloat16, (3,)),
    ("c", torch.float16, (2, 2)),
    ("d", torch.bfloat16, (2, 0)),
]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three edits: a byte, a bit, a token put in or over others, a stretch dropped, doubled or moved."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, to = sorted((rng.randrange(len(out) + 1), rng.randrange(len(out) + 1)))
        to = min(to, at + rng.choice((1, 2, 8, 64)))
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at:to] = rng.choice(TOKENS)
        elif kind == 3:
            del out[at:to]
        elif kind == 4:
            out[at:at] = out[at:to]
        elif kind == 5:
            piece = out[at:to]
            del out[at:to]
            place = rng.randrange(len(out) + 1)
            out[place:place] = piece
    return bytes(out)


def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({name for name, _ in pairs}) == len(pairs), "a key stands twice"
    return dict(pairs)


def check_header(text: bytes, size: int, found: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    """An independent reading of an accepted header: its own loop over what JSON holds, against what the parser said."""
    content = json.loads(text.decode("utf-8"), object_pairs_hook=pairs_once)
    content.pop("__metadata__", None)
    assert content.keys() == found.keys()
    taken = bytearray(size - 8 - len(text))
    for name, entry in content.items():
        start, stop = entry["data_offsets"]
        count = SIZES[entry["dtype"]]
        for length in entry["shape"]:
            assert type(length) is int and length >= 0
            count *= length
        assert stop - start == count and 0 <= start <= stop <= len(taken)
        assert not any(taken[start:stop]), "two tensors share bytes"
        taken[start:stop] = b"\1" * count
        assert found[name] == (entry["dtype"], tuple(entry["shape"]), 8 + len(text) + start)
    assert all(taken), "bytes belong to no tensor"


def run(count: int, seed: int, one: Callable[[random.Random], bool]) -> int:
    """How many of `count` mutants were accepted; none takes a second."""
    rng = random.Random(seed)
    accepted = 0
    for _ in range(count):
        begin = time.monotonic()
        accepted += one(rng)
        assert time.monotonic() - begin < 10
    return accepted


def test_mutated_headers_are_refused_or_mean_what_they_say() -> None:
    head, _ = build_header(ENTRIES)
    payload = sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in ENTRIES)
    names = {getattr(torch, kind): name for kind, name in (("float64", "F64"), ("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16"), ("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2"), ("int64", "I64"), ("int32", "I32"), ("int16", "I16"), ("int8", "I8"), ("uint8", "U8"), ("bool", "BOOL"))}  # fmt: skip

    def one(rng: random.Random) -> bool:
        if rng.random() < 0.2:  # the length and what follows, as one stretch of bytes
            raw = mutate(head, rng)
            prefix, text = raw[:8], raw[8:]
            size = len(raw) + payload
            text = text[: int.from_bytes(prefix, "little")]
        else:
            text = mutate(head[8:], rng)
            prefix, size = len(text).to_bytes(8, "little"), 8 + len(text) + payload
        try:
            infos = parse_header(FILE, prefix, text, (1, size, 1))
        except CheckpointError as error:
            assert str(FILE) in str(error) and len(str(error)) < 3000
            return False
        check_header(text, size, {name: (names[info.dtype], info.shape, info.start) for name, info in infos.items()})
        return True

    accepted = run(HEADERS, SEED, one)
    assert 0 < accepted < HEADERS / 2, f"{accepted} accepted: the mutants must test both answers"


def test_mutated_indexes_are_refused_or_mean_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that reads otherwise than the original is refused beside the original's files."""
    weight_map = {f"model.layers.{n}.weight": f"model-0000{n % 3 + 1}-of-00003.safetensors" for n in range(6)}
    whole = json.dumps({"metadata": {"total_size": 96}, "weight_map": weight_map}).encode()
    for file in set(weight_map.values()):
        head, _ = build_header([(name, torch.float32, (2,)) for name in weight_map if weight_map[name] == file])
        (tmp_path / file).write_bytes(head + bytes(16))
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(whole)
    assert find_tensors(tmp_path).keys() == weight_map.keys()
    monkeypatch.setattr(tensor_files, "read_header", lru_cache(tensor_files.read_header))  # the files stay as they are

    def one(rng: random.Random) -> bool:
        text = mutate(whole, rng)
        try:
            found = parse_index(text, index)
        except CheckpointError as error:
            assert str(index) in str(error)
            return False
        content = json.loads(text.decode("utf-8"), object_pairs_hook=pairs_once)
        assert found == content["weight_map"] and found
        if found == weight_map:
            return True
        index.write_bytes(text)
        with pytest.raises(CheckpointError):
            find_tensors(tmp_path)
        return False

    accepted = run(INDEXES, SEED, one)
    assert 0 < accepted < INDEXES * 0.7, f"{accepted} accepted: the mutants must test both answers"
