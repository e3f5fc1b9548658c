"""What ranks do in the tests of fine-tuning data that they read together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megabridge.data import reading
from megabridge.data.examples import Examples
from megabridge.data.finetuning import Finetuning
from megabridge.parallel import collectives

SIZES = {"seq_length": 400, "micro_batch_size": 1, "global_batch_size": 2, "seed": 3}


def read(
    path: str, tokenizer: str, *, block: int, piece: int = collectives.PIECE, fails_at: str | None = None, **settings: Any
) -> dict[str, Any]:
    """All that a data module has after its setup, and how many rows this rank tokenised itself. A row with the text `fails_at`
    makes it fail."""
    encoded = 0
    encode = Examples.encode

    def counted(self: Examples, row: Any) -> Any:
        nonlocal encoded
        encoded += 1
        if fails_at is not None and f"'{fails_at}'" in str(row):
            raise ZeroDivisionError("integer division or modulo by zero")
        return encode(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        patch.setattr(collectives, "PIECE", piece)
        patch.setattr(Examples, "encode", counted)
        data = Finetuning(path=path, **settings)
        data.setup(Path(tokenizer), **SIZES)
    found = data._reads["train"]
    parts = {"train": data.train, "validation": data.validation, "all": found.samples}
    samples = {name: [(one.tokens.tobytes(), one.mask) for one in part] for name, part in parts.items()}  # type: ignore[attr-defined]
    said = {"describe": data.describe(), "truncated": found.truncated, "tally": found.tally, "pad_token": data.batching.pad_token}
    return {**samples, **said, "digests": found.digests, "encoded": encoded}


def read_all(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`read` with the arguments of each job."""
    return [read(**job) for job in jobs]


def failing(paths: list[str], tokenizer: str, **settings: Any) -> tuple[str, float]:
    """What this rank, which reads its own of `paths`, says of a failure, and after how many seconds."""
    begun = time.monotonic()
    try:
        read(paths[collectives.rank()], tokenizer, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begun
    return "", time.monotonic() - begun


def together(sizes: list[int], piece: int) -> list[bytes]:
    """Every rank's bytes; rank r sends sizes[r] of them."""
    own = bytearray((collectives.rank() * 50 + place) % 251 for place in range(sizes[collectives.rank()]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "PIECE", piece)
        return [bytes(content) for content in collectives.all_gather_bytes(own)]
