"""Tokens that the model doesn't have are refused as they are read: the error says where, which, and what the model has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabridge.data import indexed, prepare
from megabridge.data.finetuning import Finetuning
from megabridge.data.module import DataModule
from megabridge.data.pretraining import IndexedTokens
from megabridge.data.pydoc import PydocTopics
from megabridge.data.streaming import StreamedText
from megabridge.data.synthetic import RandomTokens
from megabridge.data.text import load_tokenizer, pad_token
from megabridge.data.vocabulary import check_ids
from megabridge.errors import ConfigError
from megabridge.evaluation import evaluate, load, parsed
from megabridge.hf import byte_tokenizer
from tests.support.chat_rows import jsonl
from tests.support.models import TINY

ASCII = 4 + 128
"""Ids of the byte-level tokenizer that plain English needs."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer.write_tokenizer(folder)
    return folder


def taken(data: DataModule, tokenizer: Path, vocab_size: int | None) -> None:
    """Sets `data` up and takes a few batches."""
    data.vocab_size = vocab_size
    data.setup(tokenizer, seq_length=8, micro_batch_size=1, global_batch_size=1, seed=3)
    batches = data.train_batches(0, dp_rank=0, dp_size=1)
    for _ in range(4):
        next(batches)


def test_every_module_refuses_what_the_model_has_no_row_for(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"text": "plain"}, {"text": "caf\u00e9"}, {"text": "words"}]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    indexed.write(tmp_path / "set", [[1, 2, 3, 4, 5] * 4, [6, 7, 500, 8, 9, 10] * 3], 260)
    written = np.asarray([3, -7, 5] * 6, np.int32)
    (tmp_path / "signed.bin").write_bytes(written.tobytes())
    indexed.write_index(tmp_path / "signed.idx", [len(written)], np.int32)
    cases: list[tuple[Callable[[], DataModule], str]] = [
        (lambda: Finetuning(path=str(file), validation_share=0.0, overlong="truncate"), f"{file}:2: token id 19"),
        (lambda: Finetuning(path=str(file), packing=True, overlong="truncate"), f"{file}:2: token id 19"),
        (lambda: StreamedText(path=str(file), validation_documents=0, shuffle_buffer=0), f"{file}:train row 1: token id 19"),
        (lambda: StreamedText(path=str(file), validation_documents=2), f"{file}:validation row 1: token id 19"),
        (lambda: IndexedTokens(paths=[str(tmp_path / "set")], split=[1]), "set: token id 500 "),
        (lambda: IndexedTokens(paths=[str(tmp_path / "signed")], split=[1], separate_documents=True), "signed: token id -7 "),
        (lambda: RandomTokens(vocab_size=ASCII + 1), "data.vocab_size=133: token id 132 "),
        (lambda: PydocTopics(), "of pydoc: token id "),
    ]
    for make, message in cases:
        size = 120 if "pydoc" in message else ASCII
        with pytest.raises(ConfigError) as raised:
            taken(make(), tokenizer, size)
        assert message in str(raised.value) and f"vocab_size={size}" in str(raised.value)
    taken(Finetuning(path=str(file), validation_share=0.0, overlong="truncate"), tokenizer, 260)
    with pytest.raises(ConfigError, match=r"rows.jsonl, byte 18: token id 19\d must be below"):
        rules = prepare.Rules(tokenizer, vocab_size=ASCII)
        prepare.prepare([str(file)], tmp_path / "out", rules, workers=1, max_bad_share=0.0, advance=lambda done, total: None)


def test_padding_is_a_token_that_the_model_has(tokenizer: Path) -> None:
    loaded = load_tokenizer(tokenizer)
    loaded.add_special_tokens({"pad_token": "<a later one>"})
    assert (pad_token(loaded), pad_token(loaded, 261), pad_token(loaded, 260), pad_token(loaded, 1)) == (260, 260, 2, 0)


def test_ids() -> None:
    check_ids([], 4, "x")
    check_ids([0, 3], 4, "x")
    check_ids([10**12, -1], None, "x")
    for ids, first in (([0, 4, 5], 4), ([1, -1], -1), ([-100], -100)):
        with pytest.raises(ConfigError, match=f"x: token id {first} must be below the model's vocab_size=4, and not negative"):
            check_ids(ids, 4, "x")


def test_evaluations_refuse_them(tmp_path: Path) -> None:
    from megabridge.hf.random_models import write_random_model

    folder = write_random_model(tmp_path / "model", {**TINY, "vocab_size": ASCII}, tokenizer=False)
    byte_tokenizer.write_tokenizer(folder)
    (tmp_path / "text.txt").write_text("plain caf\u00e9")
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text(json.dumps({"prompt": "a", "choices": ["b", "\u00e9"], "answer": 0}))
    tasks: list[tuple[dict[str, Any], str]] = [
        ({"kind": "perplexity", "path": str(tmp_path / "text.txt")}, f"document 0 of {tmp_path / 'text.txt'}: token id 19"),
        ({"kind": "multiple_choice", "path": str(quiz)}, f"question 0 of {quiz}: token id 19"),
        ({"kind": "generations", "prompts": ["\u00e9"]}, "the prompt '\u00e9'"),
    ]
    for task, message in tasks:
        found, _ = parsed({"task": task}, where="tasks", seq_length=16)
        with pytest.raises(ConfigError) as raised:
            evaluate(folder, found, batch_size=2)
        assert message in str(raised.value) and f"vocab_size={ASCII}" in str(raised.value)
    import torch

    with pytest.raises(ConfigError, match=r"tokens\[0, 0\]: token id 132"):  # as lm-evaluation-harness asks
        load(folder, "cpu")[0](torch.tensor([[ASCII]]))
