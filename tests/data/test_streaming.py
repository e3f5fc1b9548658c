"""Documents of `datasets`' streams: in rows, in an order that resumes, and held out."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from megabridge.data.module import Batch
from megabridge.data.streaming import StreamedText
from megabridge.data.text import TextEncoder
from megabridge.errors import ConfigError
from megabridge.hf import byte_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(tokenizer, file of 40 documents)."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "tokenizer").mkdir()
    byte_tokenizer.write_tokenizer(folder / "tokenizer")
    rows = [{"body": chr(65 + number) * (1 + number * 7 % 23)} for number in range(40)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "tokenizer", folder / "corpus.jsonl"


def made(corpus: tuple[Path, Path], **settings: Any) -> StreamedText:
    settings = {"column": "body", "validation_documents": 4, "shuffle_buffer": 8, **settings}
    data = StreamedText(path=str(corpus[1]), **settings)
    data.setup(corpus[0], seq_length=8, micro_batch_size=1, global_batch_size=4, seed=2)
    return data


def test_without_shuffling_rows_are_the_documents_one_after_the_other(corpus: tuple[Path, Path]) -> None:
    encoder = TextEncoder(corpus[0])
    documents = [encoder.document(json.loads(line)["body"]) for line in corpus[1].read_text().splitlines()]
    tokens = [token for document in documents[4:] * 2 for token in document]
    batches = list(islice(made(corpus, shuffle_buffer=0).train_batches(0, dp_rank=0, dp_size=1), 80))
    found = torch.cat([batch["tokens"][0] for batch in batches])
    labels = torch.cat([batch["labels"][0] for batch in batches])
    assert found.tolist() == tokens[: len(found)] and labels.tolist() == tokens[1 : len(found) + 1]
    assert len(found) > len(tokens) / 2, "into the second epoch"
    held_out = made(corpus).validation_batches(dp_rank=0, dp_size=1)
    first = [token for document in documents[:4] for token in document]
    assert torch.cat([batch["tokens"][0] for batch in held_out]).tolist() == first[: 8 * len(held_out)] and held_out


@pytest.mark.parametrize("separate", [False, True])
def test_order_resumes_and_does_not_depend_on_dp(corpus: tuple[Path, Path], separate: bool) -> None:
    def rows(count: int, dp: int, consumed: int = 0) -> list[Batch]:
        data = [made(corpus, separate_documents=separate) for _ in range(dp)]
        iterators = [one.train_batches(consumed, dp_rank=rank, dp_size=dp) for rank, one in enumerate(data)]
        return [next(iterator) for _ in range(count // dp) for iterator in iterators]

    alone = rows(80, 1)
    for other in (rows(80, 2), alone[:40] + rows(40, 1, consumed=40)):
        assert all(torch.equal(one[name], two[name]) for one, two in zip(alone, other, strict=True) for name in one)
    tokens = torch.cat([batch["tokens"][0] for batch in alone])
    assert not torch.equal(tokens[:200], torch.cat([batch["tokens"][0] for batch in rows(40, 1)])[200:])
    if separate:
        learned = [batch["loss_mask"].bool() for batch in alone]
        same = [
            (batch["tokens"] == batch["labels"])[mask] | (batch["labels"] == 2)[mask]
            for batch, mask in zip(alone, learned, strict=True)
        ]
        assert bool(torch.cat(same).all()), "a label is the same letter, or the document's end"


def test_a_file_of_text_is_a_document(tmp_path: Path, corpus: tuple[Path, Path]) -> None:
    (tmp_path / "a.txt").write_text("line\n\nline " * 9)
    data = made((corpus[0], tmp_path / "a.txt"), column="text", validation_documents=0)
    batches = list(islice(data.train_batches(0, dp_rank=0, dp_size=1), 13))
    tokens = torch.cat([batch["tokens"][0] for batch in batches]).tolist()
    whole = TextEncoder(corpus[0]).document("line\n\nline " * 9)
    assert tokens[: len(whole)] == whole


def test_bad_rows_are_counted_and_stop_past_the_share(tmp_path: Path, corpus: tuple[Path, Path]) -> None:
    rows: list[Any] = [{"body": f"document {number}"} for number in range(20)]
    rows[7], rows[9], rows[2] = {"body": " "}, {"body": None}, {"body": ""}
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = made((corpus[0], file), max_bad_share=0.3)
    assert "1 of 4 rows left out (1 empty)" in data.describe() and data.left_out() == ""
    list(islice(data.train_batches(0, dp_rank=0, dp_size=1), 60))
    assert " empty" in data.left_out() and " missing field" in data.left_out()
    with pytest.raises(ConfigError, match="1 of 4 rows can't be used"):
        made((corpus[0], file), max_bad_share=0.1)
    strict = made((corpus[0], file), max_bad_share=0.1, validation_documents=0)
    with pytest.raises(ConfigError, match="3 of 20 rows can't be used"):
        list(islice(strict.train_batches(0, dp_rank=0, dp_size=1), 60))


def test_what_can_not_be_streamed_is_refused(tmp_path: Path, corpus: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="no document besides those held out"):
        next(made(corpus, validation_documents=40).train_batches(0, dp_rank=0, dp_size=1))
    (tmp_path / "broken.jsonl").write_text('{"body": "a"}\n{"body": \n')
    with pytest.raises(ConfigError, match=r"broken\.jsonl can't be read"):
        made((corpus[0], tmp_path / "broken.jsonl"))
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(ConfigError, match="files of several kinds"):
        made((corpus[0], tmp_path))
    with pytest.raises(ConfigError, match=r"data\.shuffle_buffer=-1 must be at least 0"):
        made(corpus, shuffle_buffer=-1)
