"""Fine-tuning data from files: schemas, bad rows, validation, order, packing; the mask of conversations as they stand in files."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megabridge.data.finetuning import Finetuning
from megabridge.data.module import Batch, RowRules
from megabridge.data.show import spans
from megabridge.data.text import load_tokenizer
from megabridge.errors import ConfigError
from megabridge.hf import byte_tokenizer
from tests.support.chat_rows import BAD, chat, jsonl, made
from tests.support.chat_templates import TOOLS, byte_folder, tagged


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


def rendered(data: Finetuning, tokenizer: Path) -> list[str]:
    """The first epoch's rows as text, sorted; what is learned stands in brackets."""
    loaded, batches = load_tokenizer(tokenizer), islice(data.train_batches(0, dp_rank=0, dp_size=1), data.epoch_rows())
    parts = [spans(batch, loaded) for batch in batches]
    return sorted("".join(f"[{part.text}]" if part.is_learned else part.text for part in row) for row in parts)


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def answer(content: str) -> str:
    return f"<|im_start|>assistant\n[{content}<|im_end|>]"


def test_alpaca_rows_are_understood(tmp_path: Path, tokenizer: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "2, 3", "output": "5", "text": "all of it"},
        {"instruction": "Say yes.", "input": "", "output": "Yes."},
        {"instruction": "Say no.", "output": "No.", "system": "Obey."},
    ]
    path = jsonl(tmp_path / "alpaca.jsonl", rows)
    data = made(path, tokenizer, validation_share=0)
    assert "(alpaca)" in data.describe()
    assert rendered(data, tokenizer) == sorted(
        [
            turn("user", "Add.\n\n2, 3") + answer("5"),
            turn("user", "Say yes.") + answer("Yes."),
            turn("system", "Obey.") + turn("user", "Say no.") + answer("No."),
        ]
    )
    (tmp_path / "base").mkdir()
    base = byte_folder(tmp_path / "base", None)  # no chat template: the prompts that Alpaca had
    texts = rendered(made(path, base, length=600, validation_share=0), base)
    assert len(texts) == 3 and any(text.endswith("### Input:\n2, 3\n\n### Response:\n[5<|im_end|>]") for text in texts)
    assert any(text.startswith("Obey.\n\nBelow is an instruction") for text in texts)


def test_sharegpt_rows_are_understood(tmp_path: Path) -> None:
    tokenizer = byte_folder(tmp_path / "model", tagged(TOOLS, keep=False))
    call = {"name": "add", "arguments": {"a": 1}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    talk = [{"from": "human", "value": "1 + 1?"}, {"from": "function_call", "value": json.dumps(call)}]
    talk += [{"from": "observation", "value": "2"}, {"from": "gpt", "value": "Two."}]
    said = answer('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>') + "\n"
    said += "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n" + answer("Two.")
    hello = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    greeted = turn("system", "Be kind.") + turn("user", "Hi") + answer("Hello.")
    rows = [
        {"conversations": talk, "tools": json.dumps(tools)},
        {"conversations": talk, "tools": "[]"},
        {"conversations": hello, "id": "1"},
        {"conversations": hello[1:], "system": "Be kind.", "tools": ""},
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}], "tools": None},
    ]
    path = jsonl(tmp_path / "chats.jsonl", rows)
    data = made(path, tokenizer, validation_share=0)
    assert "(sharegpt)" in data.describe() and "left out" not in data.describe()
    head = '<|im_start|>system\n# Tools\n{"type": "function", "function": {"name": "add"}}<|im_end|>\n'
    begun = turn("user", "1 + 1?")
    assert rendered(data, tokenizer) == sorted(
        [head + begun + said, begun + said, greeted, greeted, turn("user", "Hi") + answer("Hello.")]
    )
    bad = [
        {"conversations": [{"from": "wizard", "value": "x"}, *hello]},
        {"conversations": [hello[1], {"from": "function_call", "value": "add 1"}]},
        {"conversations": [hello[1], {"from": "function_call", "value": "[]"}]},
        {"conversations": [hello[1], {"from": "function_call", "value": '{"name": 1}'}]},
        {"conversations": [hello[1], {"from": "gpt"}]},
        {"conversations": "none"},
        {"conversations": hello, "tools": "add"},
        {"conversations": hello, "tools": [1]},
    ]
    some = made(jsonl(tmp_path / "some.jsonl", [*rows, *bad]), tokenizer, validation_share=0, max_bad_share=0.9)
    assert len(some.train) == 5 and "8 of 13 rows left out (6 not readable, 1 role order, 1 missing field)" in some.describe()


def test_tools_of_a_row_and_arguments_as_json(tmp_path: Path) -> None:
    tokenizer = byte_folder(tmp_path / "model", tagged(TOOLS, keep=False))
    tools = [{"type": "function", "function": {"name": "add"}}]
    texts = []
    for arguments in ({"a": 1}, '{"a": 1}'):
        call = {"id": None, "type": "function", "function": {"name": "add", "arguments": arguments}}
        talk = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        path = jsonl(tmp_path / "rows.jsonl", [{"messages": talk, "tools": tools}])
        texts += rendered(made(path, tokenizer, validation_share=0), tokenizer)
    assert texts[0] == texts[1] and texts[0].endswith(
        '[<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>]'
    )
    assert "# Tools" in texts[0]


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"question": "a", "answer": "b", "id": 1}, "prompt: question, completion: answer"),
        ({"dialogue": []}, "messages: dialogue"),
        ({"content": "a"}, "text: content"),
        ({"x": "a", "y": "b"}, "prompt: ..., completion: ..."),
    ],
)
def test_columns_that_are_not_known_are_named_with_the_remedy(
    tmp_path: Path, tokenizer: Path, row: dict[str, Any], example: str
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [row] * 5)
    with pytest.raises(ConfigError) as caught:
        made(path, tokenizer)
    said = str(caught.value)
    assert said.startswith(f"data.path={path} must have rows of a known schema (messages; conversations; prompt and completion; ")
    assert f"its columns are {', '.join(row)}; say which is which by data.columns, e.g. data.columns='{{{example}}}'." in said


def test_rows_are_packed_where_it_pays_and_it_is_said(tmp_path: Path, tokenizer: Path) -> None:
    """Twenty of a hundred samples are long."""
    long = [{"text": "x" * 360 + str(number)} for number in range(20)]
    path = jsonl(tmp_path / "texts.jsonl", [*long, *({"text": "short" + str(number)} for number in range(180))])

    def said(**settings: Any) -> tuple[bool, str, int]:
        data = made(path, tokenizer, **{"packing": "auto", "validation_share": 0, "rows": 2, **settings})
        return data.decided()["data.packing"] is True, data.describe(), data.epoch_rows()

    packs, line, rows = said()
    assert packs and f"in {rows} packed rows; validation" in line and rows < 40
    assert f"data.packing=auto: packed: {rows} rows with " in line and "where steps padded to their longest sample have 37%" in line
    few = said(rows=8)
    assert not few[0] and few[2] == 200
    assert f"padded: packed, an epoch would be {rows} rows, {rows // 8} steps, and should be 8" in few[1]
    assert "padded, because of data.pad_to" in said(pad_to="seq_length")[1] and not said(pad_to=8)[0]
    assert said(packing=True)[2] == rows and "auto" not in said(packing=True)[1] and said(packing=False)[2] == 200
    even = jsonl(tmp_path / "even.jsonl", [{"text": "x" * 300}] * 60)
    data = made(even, tokenizer, packing="auto", validation_share=0)
    assert not data.batching.packing and "with 25% padding, where steps padded to their longest sample have 0%" in data.describe()
    unable = Finetuning(path=str(path))
    unable.row_rules = RowRules(unpackable="parallel.cp=2")
    unable.setup(tokenizer, seq_length=400, micro_batch_size=1, global_batch_size=2, seed=3)
    assert not unable.batching.packing and "auto: padded: parallel.cp=2 has no packed rows" in unable.describe()
    with pytest.raises(ConfigError, match=r"data\.packing='maybe' must be auto, true or false"):
        made(path, tokenizer, packing="maybe")


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
