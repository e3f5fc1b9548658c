"""Text, JSONL and parquet to indexed data: the same tokens as one by one, whatever the number of processes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megabridge.data import prepare as preparing
from megabridge.data.indexed import Indexed
from megabridge.data.prepare import Prepared, Rules, prepare
from megabridge.data.text import TextEncoder
from megabridge.errors import ConfigError
from megabridge.hf import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer.write_tokenizer(folder)
    return folder


def texts(count: int) -> list[str]:
    chance = random.Random(count)
    return ["".join(chance.choice("aé \n日") for _ in range(chance.randrange(1, 60))) + "." for _ in range(count)]


def run(paths: list[Path], output: Path, tokenizer: Path, *, workers: int = 1, share: float = 0.0, **rules: Any) -> Prepared:
    seen: list[tuple[int, int]] = []
    made = prepare(
        [str(path) for path in paths],
        output,
        Rules(tokenizer, **rules),
        workers=workers,
        max_bad_share=share,
        advance=lambda done, total: seen.append((done, total)),
    )
    assert seen and seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    return made


def read(prefix: Path) -> list[list[int]]:
    found = Indexed(prefix)
    return [found.tokens(number).tolist() for number in range(len(found))]


def test_every_kind_of_file_and_any_number_of_processes(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "RANGE", 500)
    wanted = texts(90)
    lines, table, text = tmp_path / "a.jsonl", tmp_path / "b.parquet", tmp_path / "c.txt"
    # Lines of Windows, empty lines, and no break at the end.
    lines.write_bytes("\r\n".join(json.dumps({"text": one, "id": 1}, ensure_ascii=False) for one in wanted[:40]).encode() + b"\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(49)), "text": wanted[40:89]}), table, row_group_size=10)
    text.write_text(wanted[89])
    one = run([lines, table, text], tmp_path / "one", tokenizer)
    encoder = TextEncoder(tokenizer)
    assert read(tmp_path / "one") == [encoder.document(document) for document in wanted]
    assert (one.documents, one.tokens) == (90, sum(len(encoder.document(document)) for document in wanted))
    # One after the other, and all of a folder's files.
    run([tmp_path], tmp_path / "out" / "three", tokenizer, workers=3)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / "out" / f"three.{suffix}").read_bytes()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["three.bin", "three.idx"]


def test_lines_of_text_without_an_end(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n\ntwo\nthree")
    run([tmp_path / "lines.txt"], tmp_path / "lines", tokenizer, text_lines=True, append_end=False)
    encoder = TextEncoder(tokenizer)
    assert read(tmp_path / "lines") == [encoder.tokenizer(line)["input_ids"] for line in ("one", "two", "three")]


def test_bad_rows_are_counted_and_stop_past_the_share(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "RANGE", 64)
    good = [json.dumps({"body": text}).encode() for text in texts(20)]
    bad = [b"{", b'{"text": "x"}', b'{"body": " "}', b'{"body": 3}', b'"\xff"', b'{"body": "\\udc00"}']
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(b"\n".join(good[:10] + bad + good[10:]))
    made = run([file], tmp_path / "mixed", tokenizer, workers=2, share=0.25, column="body")
    assert made.documents == 20 == len(read(tmp_path / "mixed"))
    assert made.tally.bad == {"not readable": 2, "missing field": 1, "empty": 1, "bad encoding": 2}
    place = len(b"\n".join(good[:10])) + 1
    with pytest.raises(ConfigError, match=r"6 of 26 rows can't be used, which is more than prepare\.max_bad_share=0\.2") as raised:
        run([file], tmp_path / "again", tokenizer, share=0.2, column="body")
    assert f"{file}, byte {place}: not JSON" in str(raised.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mixed.bin", "mixed.idx", "mixed.jsonl"]


def test_what_can_not_be_prepared_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}')
    for paths, message in (
        ([], "prepare.paths names no file"),
        ([tmp_path / "none.jsonl"], "names no file"),
        (["some/set"], "data=streaming"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(paths, tmp_path / "x", tokenizer)  # type: ignore[arg-type]
    run([file], tmp_path / "b", tokenizer)
    with pytest.raises(ConfigError, match=r"b\.bin exists; remove it, or set another prepare\.output"):
        run([file], tmp_path / "b", tokenizer)
    (tmp_path / "a.csv").write_text("text")
    with pytest.raises(ConfigError, match=r"a\.csv must be \.jsonl"):
        run([tmp_path / "a.csv"], tmp_path / "c", tokenizer)
