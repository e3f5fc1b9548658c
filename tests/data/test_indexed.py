"""The indexed format beside megatron-core's own, and rows that follow from seed and position alone."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megabridge.data import indexed
from megabridge.data.pretraining import Blend, IndexedTokens, TokenWindows, split_documents
from megabridge.errors import ConfigError

S = 8


def corpus(folder: Path, name: str, documents: int, first: int = 0) -> Path:
    """Document i has 1 + i * 7 % 23 tokens; every token of the corpus is another number."""
    sizes = [1 + number * 7 % 23 for number in range(documents)]
    ends = np.cumsum(sizes)
    indexed.write(
        folder / name, [list(range(first + end - size, first + end)) for size, end in zip(sizes, ends, strict=True)], 60000
    )
    return folder / name


def made(paths: list[Path], **settings: Any) -> IndexedTokens:
    data = IndexedTokens(paths=[str(path) for path in paths], **settings)
    data.setup(Path(), seq_length=S, micro_batch_size=2, global_batch_size=4, seed=5)
    return data


@pytest.mark.parametrize("vocabulary", [60000, 128256])
def test_megatron_core_reads_what_we_write_and_we_what_it_writes(tmp_path: Path, vocabulary: int) -> None:
    from megatron.core.datasets import indexed_dataset

    documents = [[5, 6, 7], [vocabulary - 1], [], list(range(100))]
    indexed.write(tmp_path / "ours", documents, vocabulary)
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[number].tolist() for number in range(4)] == documents
    dtype = indexed_dataset.DType.optimal_dtype(vocabulary)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.long), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    # Documents of several sequences, as its builder makes them of sentences.
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "parts.bin"), dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3]), [2, 1])
    builder.add_document(torch.tensor([4]), [1])
    builder.finalize(str(tmp_path / "parts.idx"))
    parts = indexed.Indexed(tmp_path / "parts.idx")
    assert parts.lengths.tolist() == [3, 1]
    assert [parts.tokens(0).tolist(), parts.tokens(0, 1, 3).tolist(), parts.tokens(1).tolist()] == [[1, 2, 3], [2, 3], [4]]


def test_files_that_are_damaged_are_refused(tmp_path: Path) -> None:
    index = Path(f"{corpus(tmp_path, 'good', 10)}.idx")
    good, content = index.read_bytes(), (tmp_path / "good.bin").read_bytes()
    cases = {
        r"is not a megatron-core index": b"GARBAGE" * 9,
        r"cut off, make it again": good[:-9],
        r"version 7": good[:9] + (7).to_bytes(8, "little") + good[17:],
        r"dtype code 6": good[:17] + b"\6" + good[18:],
        r"negative": good[:34] + (-1).to_bytes(4, "little", signed=True) + good[38:],
        r"points past the end": good[:34] + (1 << 20).to_bytes(4, "little") + good[38:],
        r"don't cover its sequences": good[:-8] + (9).to_bytes(8, "little"),
        r"should have": good[:18] + (1 << 60).to_bytes(8, "little") + good[26:],
    }
    for message, damaged in cases.items():
        index.write_bytes(damaged)
        with pytest.raises(ConfigError, match=message):
            indexed.Indexed(tmp_path / "good")
    index.write_bytes(good)
    (tmp_path / "good.bin").write_bytes(content[:-2])
    with pytest.raises(ConfigError, match="points past the end"):
        indexed.Indexed(tmp_path / "good")
    with pytest.raises(ConfigError, match=r"none\.bin does not exist; make it with recipe=prepare_data"):
        indexed.Indexed(tmp_path / "none")


def test_an_epoch_has_every_token_as_a_label_once(tmp_path: Path) -> None:
    windows = TokenWindows(indexed.Indexed(corpus(tmp_path, "a", 40)), range(40), S, "seed")
    epochs = []
    for epoch in range(2):
        found = [np.concatenate(windows.window(epoch * windows.per_epoch + number)) for number in range(windows.per_epoch)]
        assert {len(window) for window in found} == {S + 1}
        labels = [int(token) for window in found for token in window[1:]]
        assert len(labels) == len(set(labels)) == windows.per_epoch * S > windows.tokens - 1 - S
        epochs.append(labels)
    assert epochs[0] != epochs[1] and sorted(epochs[0])[:3] == [0, 1, 2]
    pieces = windows.window(3)
    assert all((np.diff(piece) == 1).all() for piece in pieces), "a piece is of one document"


def test_rows_are_pinned_by_the_seed(tmp_path: Path) -> None:
    # A change here would make resumed runs see other batches than those they were started with.
    data = made([corpus(tmp_path, "a", 40), corpus(tmp_path, "b", 9, 1000)], weights=[1, 3])
    first = next(iter(data.train_batches(0, dp_rank=0, dp_size=1)))
    assert first["tokens"].tolist() == [[1049, 1050, 1051, 1085, 1086, 1087, 1088, 1001], [217, 218, 219, 220, 221, 222, 223, 224]]


@pytest.mark.parametrize("separate", [False, True])
def test_rows_do_not_depend_on_dp_and_resume(tmp_path: Path, separate: bool) -> None:
    paths = [corpus(tmp_path, "a", 40), corpus(tmp_path, "b", 30, 1000)]
    alone = list(islice(made(paths, separate_documents=separate).train_batches(0, dp_rank=0, dp_size=1), 60))
    of_two = [made(paths, separate_documents=separate).train_batches(0, dp_rank=rank, dp_size=2) for rank in range(2)]
    spread = [next(iterator) for _ in range(30) for iterator in of_two]
    resumed = list(islice(made(paths, separate_documents=separate).train_batches(40, dp_rank=0, dp_size=1), 40))
    for other in (spread, alone[:20] + resumed):
        for one, another in zip(alone, other, strict=True):
            assert one.keys() == another.keys()
            assert all(torch.equal(one[name], another[name]) for name in one)


def test_separate_documents_do_not_predict_one_another(tmp_path: Path) -> None:
    path = corpus(tmp_path, "a", 40)
    joined = next(iter(made([path]).train_batches(0, dp_rank=0, dp_size=1)))
    assert "documents" not in joined and bool(joined["loss_mask"].all())
    crossing = 0
    for batch in islice(made([path], separate_documents=True).train_batches(0, dp_rank=0, dp_size=1), 20):
        learned = batch["loss_mask"].bool()
        # Tokens of a document are numbers one after the other.
        assert bool((batch["labels"] - batch["tokens"] == 1)[learned].all())
        crossing += int((batch["documents"].amax(1) > 1).sum())
    assert crossing > 5


def test_blends_keep_to_their_weights_everywhere() -> None:
    weights = [5.0, 2.0, 1.0, 0.01]
    blend = Blend(weights)
    count = 3 * 4096 + 17
    places = [blend.place(position) for position in range(count)]
    seen: Counter[int] = Counter()
    for position, (which, row) in enumerate(places, 1):
        assert row == seen[which], "rows of a set come one after the other"
        seen[which] += 1
        if position % 97 == 0:
            assert all(abs(seen[number] - position * weight / sum(weights)) < 2 for number, weight in enumerate(weights))
    again = Blend(weights)
    assert [again.place(position) for position in (9000, 4095, 4096, 12000)] == [
        places[position] for position in (9000, 4095, 4096, 12000)
    ]


def test_splits_are_megatron_cores(tmp_path: Path) -> None:
    from megatron.core.datasets import blended_megatron_dataset_config as theirs

    for text in ("969,30,1", "99,1", "1", "3,1,1", "0.9,0.05,0.05"):
        matrix = theirs.convert_split_vector_to_split_matrix(theirs.parse_and_normalize_split(text))
        for count in (0, 1, 7, 1000):
            found = split_documents(count, [float(share) for share in text.split(",")])
            expected = [range(0) if part is None else range(round(part[0] * count), round(part[1] * count)) for part in matrix]
            assert [list(part) for part in found] == [list(part) for part in expected]


def test_validation_rows_are_of_held_out_documents(tmp_path: Path) -> None:
    data = made([corpus(tmp_path, "a", 200), corpus(tmp_path, "b", 100, 10_000)], split=[8, 1, 1], validation_samples=10)
    batches = [batch for rank in range(2) for batch in data.validation_batches(dp_rank=rank, dp_size=2)]
    held_out = torch.cat([batch["labels"][batch["loss_mask"].bool()] for batch in batches]).tolist()
    assert len(held_out) == 10 * S == len(set(held_out))
    trained = {
        int(token) for batch in islice(data.train_batches(0, dp_rank=0, dp_size=1), 400) for token in batch["labels"].flatten()
    }
    assert len(trained) > 2000 and not trained & set(held_out)
    assert "a (66.9%, 1915 tokens)" in data.describe() and "validation 10 rows" in data.describe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paths": []}, "must name at least one prefix"),
        ({"weights": [1.0, 2.0]}, r"data\.weights=\[1\.0, 2\.0\] must be 1 positive numbers"),
        ({"split": [0, 1]}, r"data\.split=\[0, 1\] must be"),
        ({"split": [1, 99]}, r"must have more than recipe\.seq_length=8 tokens to train on"),
    ],
)
def test_settings_that_can_not_work_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(settings.pop("paths", [corpus(tmp_path, "a", 9)]), **settings)
