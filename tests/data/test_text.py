"""The tokenizer of somebody else's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megabridge.data.text import load_tokenizer
from megabridge.errors import CheckpointError
from megabridge.hf.byte_tokenizer import write_tokenizer


def test_a_broken_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    """Whatever transformers and tokenizers raise at it."""
    write_tokenizer(tmp_path)
    file, settings = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    good = file.read_text(), settings.read_text()
    assert len(load_tokenizer(tmp_path)) == 260
    broken = {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}}
    for text in (
        "",
        "{",
        "null",
        "[]",
        "3",
        '{"model": 1}',
        "[" * 100_000,
        "\udcff",
        json.dumps(json.loads(good[0]) | broken),
        None,
    ):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text, errors="surrogateescape")
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(tmp_path)
        said = str(caught.value)
        assert said.startswith(f"the tokenizer in {tmp_path} must be one that transformers loads, but: ") and "\n" not in said
        assert said.endswith("; fetch its files again, or replace them by another's.")
    file.write_text(good[0])
    for text in ("", "null", '{"tokenizer_class": 3}'):
        settings.write_text(text)
        with pytest.raises(CheckpointError, match="must be one that transformers loads"):
            load_tokenizer(tmp_path)
