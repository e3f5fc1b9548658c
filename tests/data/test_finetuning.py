"""Fine-tuning data from files: schemas, bad rows, validation, order, packing; the mask of conversations as they stand in files."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megabridge.data.finetuning import Finetuning
from megabridge.data.module import Batch
from megabridge.data.show import spans
from megabridge.data.text import load_tokenizer
from megabridge.errors import ConfigError
from megabridge.hf import byte_tokenizer
from tests.support.chat_rows import BAD, chat, jsonl, made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer.write_tokenizer(folder)
    return folder


def learned(batches: list[Batch], tokenizer: Path) -> list[list[str]]:
    """What is learned in each row, stretch by stretch."""
    loaded = load_tokenizer(tokenizer)
    return [[part.text for part in spans(batch, loaded) if part.is_learned] for batch in batches]


def epoch(data: Finetuning, tokenizer: Path) -> list[list[str]]:
    count = len(data.batching.rows(data.train, 3))
    return learned(list(islice(data.train_batches(0, dp_rank=0, dp_size=1), count)), tokenizer)


def answers(number: int) -> list[str]:
    return [f"answer {number}" + "!" * (number % 7) + "<|im_end|>", f"é more of {number}\n<|im_end|>"]


def test_on_smollm2_the_unmasked_tokens_are_the_assistants_text_and_its_end(smollm2: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "chats.jsonl", [chat(number) for number in range(12)])
    padded = made(path, smollm2, length=128, validation_share=0)
    assert sorted(epoch(padded, smollm2)) == sorted(answers(number) for number in range(12))
    packed = made(path, smollm2, length=128, validation_share=0, packing=True)
    rows = epoch(packed, smollm2)
    assert len(rows) < 12
    assert sorted(text for row in rows for text in row) == sorted(text for number in range(12) for text in answers(number))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_every_source_gives_the_same_rows(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    rows = [chat(number) for number in range(30)]
    path = tmp_path / f"chats.{kind}"
    if kind == "jsonl":
        jsonl(path, rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    else:  # a folder that `datasets` knows and we don't
        path.mkdir()
        jsonl(path / "train.json", rows)
    data = made(path, tokenizer, validation_share=0.2)
    held_out = learned([batch for batch in data.validation_batches(dp_rank=0, dp_size=1) if batch["loss_mask"].any()], tokenizer)
    assert len(held_out) == 6
    assert sorted(epoch(data, tokenizer) + held_out) == sorted(answers(number) for number in range(30))
    # The same rows are held out, whatever their order and their kind of file.
    again = made(jsonl(tmp_path / "again.jsonl", rows[::-1]), tokenizer, validation_share=0.2)
    assert sorted(learned(again.validation_batches(dp_rank=0, dp_size=1), tokenizer)) == sorted(held_out)


def test_prompts_with_completions_and_plain_text(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(5)]
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    pairs = made(path, tokenizer, validation_share=0)
    assert sorted(epoch(pairs, tokenizer)) == [[f"{number}<|im_end|>"] for number in range(1, 6)]
    as_chat = made(path, tokenizer, validation_share=0, prompt_as_chat=True)
    first = next(iter(as_chat.train_batches(0, dp_rank=0, dp_size=1)))
    parts = spans(first, load_tokenizer(tokenizer))
    assert parts[0].text.startswith("<|im_start|>user\n") and parts[1].text.endswith("<|im_end|>")
    renamed = jsonl(tmp_path / "renamed.jsonl", [{"q": row["prompt"], "a": row["completion"], "text": "no"} for row in rows])
    columns = {"prompt": "q", "completion": "a"}
    assert sorted(epoch(made(renamed, tokenizer, validation_share=0, columns=columns), tokenizer)) == sorted(
        epoch(pairs, tokenizer)
    )
    texts = made(jsonl(tmp_path / "texts.jsonl", [{"text": "Once upon"}, {"text": "a time"}]), tokenizer, validation_share=0)
    # The first token is never a label.
    assert sorted(epoch(texts, tokenizer)) == [[" time<|im_end|>"], ["nce upon<|im_end|>"]]
    (tmp_path / "file.txt").write_text("All of it.\n\nIs one document.")
    whole = made(tmp_path / "file.txt", tokenizer, validation_share=0)
    assert epoch(whole, tokenizer) == [["ll of it.\n\nIs one document.<|im_end|>"]]


def test_bad_rows_are_counted_by_kind_and_left_out(tmp_path: Path, tokenizer: Path) -> None:
    bad = [row for rows in BAD.values() for row in rows]
    path = jsonl(tmp_path / "some.jsonl", [chat(number) for number in range(40)] + bad)
    data = made(path, tokenizer, max_bad_share=0.6, validation_share=0)
    assert len(data.train) == 40
    said = data.describe()
    assert f"{len(bad)} of {40 + len(bad)} rows left out" in said and f"), the first at {path}:41" in said
    for kind, rows in BAD.items():
        assert f"{len(rows)} {kind}" in said
    cut = made(path, tokenizer, max_bad_share=0.6, validation_share=0, overlong="truncate")
    assert len(cut.train) == 41 and "1 truncated" in cut.describe() and "too long" not in cut.describe()
    assert max(sample.positions for sample in cut.train) == 400


def test_bad_rows_past_the_share_stop_the_run_and_are_shown(tmp_path: Path, tokenizer: Path) -> None:
    bad = [row for rows in BAD.values() for row in rows]
    path = jsonl(tmp_path / "some.jsonl", [chat(number) for number in range(40)] + bad)
    with pytest.raises(ConfigError) as raised:
        made(path, tokenizer)
    message = str(raised.value)
    assert f"{len(bad)} of {40 + len(bad)} rows can't be used, which is more than data.max_bad_share=0.01" in message
    for kind, rows in BAD.items():
        assert f"\n  {len(rows)} {kind}\n" in message
    assert f"{path}:41: messages; the row has text" in message
    assert ": 522 tokens, recipe.seq_length=400 takes 401" in message
    assert "message 1 is by user after user" in message and "message 0 is by assistant after nothing" in message
    with pytest.raises(ConfigError, match="none of 2 rows can be used"):
        made(jsonl(tmp_path / "all.jsonl", BAD["empty"]), tokenizer, max_bad_share=1.0)
    with pytest.raises(ConfigError, match="has no row"):
        made(jsonl(tmp_path / "none.jsonl", []), tokenizer)


def test_what_a_template_can_not_tell_apart_is_never_learned(tmp_path: Path) -> None:
    byte_tokenizer.write_tokenizer(tmp_path)
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + '\n' }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    path = jsonl(tmp_path / "chats.jsonl", [chat(number) for number in range(3)])
    with pytest.raises(ConfigError, match=r"3 not exact in the chat template\n .*chats.jsonl:1: .*chat template of"):
        made(path, tmp_path, max_bad_share=1.0)


def test_parquet_with_bytes_that_are_no_text(tmp_path: Path, tokenizer: Path) -> None:
    good, bad = "caf\u00e9".encode(), b"caf\xe9"
    texts = pyarrow.array([good, bad, good], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "text.parquet")
    data = made(tmp_path / "text.parquet", tokenizer, max_bad_share=0.5, validation_share=0)
    assert len(data.train) == 2 and "1 of 3 rows left out (1 bad encoding)" in data.describe()
    (tmp_path / "fake.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"fake.parquet can't be read as parquet"):
        made(tmp_path / "fake.parquet", tokenizer)


@pytest.mark.parametrize(
    "filling", [{}, {"packing": True}, {"pad_to": 16, "group_by_length": True}], ids=lambda filling: "+".join(filling) or "padded"
)
def test_order_resumes_and_does_not_depend_on_dp(tmp_path: Path, tokenizer: Path, filling: dict[str, Any]) -> None:
    path = jsonl(tmp_path / "chats.jsonl", [chat(number) for number in range(50)])

    def steps(count: int, dp: int, consumed: int = 0) -> list[list[list[str]]]:
        data = [made(path, tokenizer, rows=4, **filling) for _ in range(dp)]
        iterators = [one.train_batches(consumed, dp_rank=rank, dp_size=dp) for rank, one in enumerate(data)]
        found = [[batch for iterator in iterators for batch in islice(iterator, 4 // dp)] for _ in range(count)]
        assert all(len({batch["tokens"].shape for batch in step}) == 1 for step in found)
        return [sorted(learned(step, tokenizer)) for step in found]

    alone = steps(20, 1)
    assert steps(20, 2) == alone == steps(20, 4)
    assert steps(10, 2, consumed=40) == alone[10:]


ODD: list[Any] = [
    None, 1, {"a": 1}, [{"type": "image", "image": "x"}], [{"type": "text", "text": None}], [1], True, "", "\ud800",
]  # fmt: skip


def test_one_odd_row_of_many_is_left_out(tmp_path: Path, tokenizer: Path) -> None:
    rows: list[Any] = [chat(number) for number in range(300)]
    for number, content in enumerate(ODD):
        odd = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]}
        path = jsonl(tmp_path / f"{number}.jsonl", [*rows[:50], odd, *rows[50:]])
        said = made(path, tokenizer).describe()
        assert "1 of 301 rows left out (1 " in said and said.endswith(f", the first at {path}:51"), said


@pytest.mark.parametrize(
    ("schema", "good"),
    [("text", {"text": "words"}), ("prompt_completion", {"prompt": "a", "completion": "b"})],
)
def test_odd_values_of_the_other_schemas(tmp_path: Path, tokenizer: Path, schema: str, good: dict[str, str]) -> None:
    bad = [{**good, field: value} for field in good for value in (*ODD, [], {}, " ", 1.5)]
    path = jsonl(tmp_path / "rows.jsonl", [*[good] * 100, *bad, {**good, next(iter(good)): "with \0 within"}])
    data = made(path, tokenizer, schema=schema, max_bad_share=0.5, validation_share=0)
    assert len(data.train) == 101 and f"{len(bad)} of {101 + len(bad)} rows left out" in data.describe()


def test_parts_of_text_and_calls_of_tools(tmp_path: Path, tokenizer: Path) -> None:
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{{ m['content'] or '' }}"
        "{% for call in m['tool_calls'] or [] %}<call>{{ call['function'] | tojson }}</call>{% endfor %}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}"
    )
    folder = tmp_path / "calls"
    folder.mkdir()
    byte_tokenizer.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    user = {
        "role": "user",
        "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}],
        "tool_calls": None,
    }
    asked = {"role": "assistant", "tool_calls": [call]}
    answers = [{"role": "tool", "content": "2", "tool_call_id": "1"}, {"role": "assistant", "content": "Two."}]
    rows = [{"messages": [user, {**asked, **content}, *answers]} for content in ({"content": None}, {"content": "I add. "}, {})]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    written = '<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>'
    expected = [[text, "Two.<|im_end|>"] for text in (f"I add. {written}", written, written)]
    data = made(path, folder, validation_share=0)
    assert sorted(epoch(data, folder)) == sorted(expected)
    first = spans(next(iter(data.train_batches(0, dp_rank=0, dp_size=1))), load_tokenizer(folder))
    assert first[0].text == "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    # A template that takes no such message leaves it out, and is no end.
    plain = made(
        jsonl(tmp_path / "mixed.jsonl", [*rows[:1], *[chat(number) for number in range(20)]]), tokenizer, max_bad_share=0.1
    )
    assert "1 refused by the chat template" in plain.describe()


def test_a_file_without_a_row_for_validation(tmp_path: Path, tokenizer: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", [chat(number) for number in range(8)])
    for content in ("", "\n \n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(ConfigError, match=rf"data\.validation_path={tmp_path}/empty\.jsonl has no row; name a source that has"):
            made(train, tokenizer, validation_path=str(tmp_path / "empty.jsonl"))


def test_validation_of_its_own(tmp_path: Path, tokenizer: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", [chat(number) for number in range(8)])
    own = jsonl(tmp_path / "own.jsonl", [chat(number) for number in range(100, 103)])
    data = made(train, tokenizer, validation_path=str(own))
    assert len(data.train) == 8
    found = learned([batch for batch in data.validation_batches(dp_rank=0, dp_size=1)], tokenizer)
    assert found == [answers(number) for number in range(100, 103)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schema": "mesages"}, r"data\.schema='mesages' must be one of .*; did you mean 'messages'"),
        ({"columns": {"promt": "q"}}, r"data\.columns\.promt must be one of .*; did you mean 'prompt'"),
        ({"columns": {"prompt": 1}}, r"data\.columns\.prompt=1 must be the name of a column"),
        ({"overlong": "cut"}, r"data\.overlong='cut'"),
        ({"max_bad_share": 2}, r"data\.max_bad_share=2 must be from 0 to 1"),
        ({"validation_share": 1}, r"data\.validation_share=1 must be"),
        ({"split": "train"}, r"data\.split is for data sets of the hub"),
        ({"path": "/nowhere/at/all.jsonl"}, r"names no file"),
        ({"path": "nobody/nothing-like-this"}, r"data\.path=nobody/nothing-like-this .* can't be loaded"),
    ],
)
def test_settings_that_can_not_work_are_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = jsonl(tmp_path / "chats.jsonl", [chat(number) for number in range(3)])
    with pytest.raises(ConfigError, match=message):
        made(settings.pop("path", path), tokenizer, **settings)
