"""The main job's data."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from megabridge.data.chat import ChatEncoder
from megabridge.data.pydoc import PydocTopics, split
from megabridge.errors import ConfigError
from megabridge.hf import byte_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_tokenizer.write_tokenizer(tmp_path)
    return tmp_path


def made(folder: Path, *, seq_length: int = 64, **arguments: object) -> PydocTopics:
    data = PydocTopics(**arguments)  # type: ignore[arg-type]
    data.setup(folder, seq_length=seq_length, micro_batch_size=1, global_batch_size=4, seed=5)
    return data


def test_a_tenth_is_held_out_and_no_topic_is_lost() -> None:
    train, validation = split(0.1)
    assert len(validation) == round(len(topics) / 10) and not train.keys() & validation.keys()
    assert train | validation == topics


def test_the_split_does_not_depend_on_the_process() -> None:
    code = "from megabridge.data.pydoc import split; print(sorted(split(0.1)[1]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == str(sorted(split(0.1)[1]))


def test_on_smollm2_a_sample_is_the_question_and_exactly_the_topic(smollm2: Path) -> None:
    data = made(smollm2, seq_length=2048, overlong="drop")
    encoder = ChatEncoder(smollm2)
    found = set()
    for sample in data.train.samples + data.validation.samples:
        tokens = [token for token, kept in zip(sample.tokens, sample.mask, strict=True) if kept]
        question = encoder.tokenizer.decode([token for token, kept in zip(sample.tokens, sample.mask, strict=True) if not kept])
        topic = question.split("Explain the Python topic '")[1].split("'.<|im_end|>")[0]
        assert encoder.tokenizer.decode(tokens) == topics[topic].strip() + "<|im_end|>"
        found.add(topic)
    assert len(found) == len(topics) - data.train.dropped - data.validation.dropped


def test_what_is_cut_is_counted_and_shown(folder: Path) -> None:
    data = made(folder, seq_length=256)
    longer = [topic for topic in topics if len(topics[topic].strip()) > 256]
    assert data.train.truncated + data.validation.truncated >= len(longer) > 0
    assert f"({data.train.truncated} truncated)" in data.describe()
    assert "too long and left out" in made(folder, seq_length=1024, overlong="drop").describe()


def test_batches_and_resume(folder: Path) -> None:
    data = made(folder, seq_length=128)
    through = list(islice(data.train_batches(0, dp_rank=0, dp_size=1), 12))
    resumed = list(islice(made(folder, seq_length=128).train_batches(8, dp_rank=0, dp_size=1), 4))
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(through[8:], resumed, strict=True))
    assert all(batch["tokens"].shape == (1, 128) and batch["loss_mask"].any() for batch in through)
    assert len(data.validation_batches(dp_rank=1, dp_size=3)) == 3


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.overlong='wrap' must be one of truncate, drop"):
        PydocTopics(overlong="wrap")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data.validation_share=1.0 must be between 0 and 1"):
        PydocTopics(validation_share=1.0)
    with pytest.raises(ConfigError, match=r"must contain \{topic\}"):
        PydocTopics(prompt="Explain.")


def test_the_question_is_learned_too_where_it_should_be(folder: Path) -> None:
    answers, everything = (made(folder, seq_length=512, answers_only=only) for only in (True, False))
    for some, whole in zip(answers.train.samples, everything.train.samples, strict=True):
        assert list(some.tokens) == list(whole.tokens) and all(whole.mask) and not all(some.mask)
