"""Chat templates and tokenizers that don't do: ended in a sentence, within seconds; a row that a template refuses is left out."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megabridge.callbacks.answer import answer
from megabridge.data import rendering
from megabridge.data.chat import ChatEncoder
from megabridge.data.text import load_tokenizer
from megabridge.errors import CheckpointError, ConfigError, MegabridgeError
from megabridge.evaluation.measures import generate
from megabridge.hf import byte_tokenizer
from megabridge.hf.random_models import write_random_model
from tests.support.chat_rows import chat, jsonl, made
from tests.support.chat_templates import CHATML, TURNS, byte_folder
from tests.support.models import TINY

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
BOMBS = {
    "loop": ENDLESS,
    "number": "{{ 10 ** (10 ** 10) }}",
    "memory": "{{ 'a' * 10 ** 12 }}",
    "list": "{% set ns = namespace(x=[1]) %}{% for a in range(99999) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "text": "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 1)
    monkeypatch.setattr(rendering, "MEMORY", 200 << 20)


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("base", [CHATML, byte_tokenizer.CHAT_TEMPLATE], ids=["prefixes", "tag"])
def test_a_template_without_an_end_is_ended(tmp_path: Path, kind: str, base: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"must render a conversation within 1 seconds .* and does not: it loops"):
        ChatEncoder(byte_folder(tmp_path, base + BOMBS[kind])).encode(TURNS)
    assert time.monotonic() - begun < 30


def test_one_row_that_loops_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = byte_folder(tmp_path / "model", "{% if messages[1]['content'] == 'question 7' %}" + ENDLESS + "{% endif %}" + CHATML)
    path = jsonl(tmp_path / "chats.jsonl", [chat(number) for number in range(20)])
    data = made(path, folder, validation_share=0, max_bad_share=0.1)
    assert len(data.train) == 19
    assert f"1 of 20 rows left out (1 refused by the chat template), the first at {path}:8" in data.describe()


@pytest.mark.parametrize(
    "raises",
    [
        "raise_exception('no seven')",
        "1 // 0",
        "none + 'x'",
        "messages.nothing.at_all",
        "{}['x']['y']",
        "''.__class__.mro()",
        "'x' | nope(1)",
    ],
)
def test_a_row_that_the_template_refuses_is_left_out(tmp_path: Path, raises: str) -> None:
    (tmp_path / "model").mkdir()
    template = "{% if messages[1]['content'] == 'question 7' %}{{ " + raises + " }}{% endif %}" + CHATML
    folder = byte_folder(tmp_path / "model", template)
    path = jsonl(tmp_path / "chats.jsonl", [chat(number) for number in range(20)])
    data = made(path, folder, validation_share=0, max_bad_share=0.1)
    assert len(data.train) == 19 and "1 of 20 rows left out (1 refused by the chat template)" in data.describe()


def test_a_template_that_refuses_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = byte_folder(tmp_path / "model", "{{ raise_exception('roles must alternate') }}" + CHATML)
    path = jsonl(tmp_path / "chats.jsonl", [chat(number) for number in range(20)])
    with pytest.raises(ConfigError, match=r"none of 20 rows can be used; .*\n  20 refused by .*\n .*: roles must alternate"):
        made(path, folder, max_bad_share=1.0)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}", "{{ 'x' ", "{% generation %}x", "{% bad %}", "{{ 'x' | nope(1) }}"]
)
def test_a_template_that_can_not_be_read(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match=r"the chat template of .* can't be read: ") as raised:
        ChatEncoder(byte_folder(tmp_path, template)).encode(TURNS)
    assert len(str(raised.value).splitlines()) == 1


def test_generation_has_the_same_bounds(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_folder(tmp_path, ENDLESS))
    with pytest.raises(ConfigError, match="it loops"):
        generate(None, tokenizer, ["x"], max_new_tokens=1)


def test_an_answer_that_a_template_refuses_ends_no_run(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "model", {**TINY, "vocab_size": 260})
    template = "{{ raise_exception('only after a system message') }}"
    (folder / "chat_template.jinja").write_text(template)
    said = answer(folder, "What?", max_new_tokens=1)
    assert said.startswith("(not asked: the chat template of ") and "only after a system message" in said


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"model": {"type": "BPE"}}', "\0" * 99, '{"model": 1, "version": "9"}']
)
def test_a_broken_tokenizer_is_one_sentence(tmp_path: Path, content: str) -> None:
    byte_tokenizer.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(MegabridgeError) as raised:
        ChatEncoder(tmp_path)
    assert str(tmp_path) in str(raised.value) and len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_files_of_a_tokenizer_that_are_none(tmp_path: Path, name: str) -> None:
    byte_tokenizer.write_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="must be a regular file, not a pipe"):
        load_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 1 << 34)
    with pytest.raises(CheckpointError, match="bytes, and may have"):
        load_tokenizer(tmp_path)
