"""The byte-level tokenizer as transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megabridge.hf import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_text_is_its_bytes_and_comes_back(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens == [byte + 4 for byte in text.encode()]
    assert tokenizer.decode(tokens) == text


def test_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == byte_tokenizer.VOCAB_SIZE == 260
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("<|im_start|>a<|im_end|>", add_special_tokens=False)["input_ids"] == [1, ord("a") + 4, 2]


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_its_files_are_the_same_every_time(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        byte_tokenizer.write_tokenizer(folder)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second and len(first) == 3
