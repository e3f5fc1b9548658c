"""Figures of the built-in tasks: against sums by hand, and against lm-evaluation-harness on real weights where it is installed."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megabridge.evaluation import evaluate, load, parsed
from megabridge.evaluation.run import longest
from megabridge.evaluation.scoring import ScoredTokens, continuation, document, log_likelihoods, windows
from megabridge.evaluation.tasks import Harness
from megabridge.hf.random_models import write_random_model
from tests.support.models import TINY

TEXT = "Perplexity is the exponential of the mean: é, 世界, and \U0001f600. " * 4
QUESTIONS = [
    {"prompt": "The capital of France is", "choices": ["Paris", "Berlin", "Rome", "Madrid"], "answer": 0},
    {"prompt": "Two and two is ", "choices": ["five", "four", "a hundred and one"], "answer": 1},
    {"prompt": "Water is made of hydrogen and", "choices": ["iron", "oxygen", "gold and silver, mostly"], "answer": 1},
    {"prompt": "The opposite of hot is", "choices": ["warm", "cold"], "answer": 1},
    {"prompt": "世界 means", "choices": ["world", "界", "cat"], "answer": 0},
]
needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="the package lm_eval isn't installed: pip install 'megabridge[eval]'"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**TINY, "vocab_size": 260, "initializer_range": 0.3}
    return write_random_model(tmp_path_factory.mktemp("evaluation") / "tiny", config)


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("quiz") / "quiz.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return file


def found(folder: Path, batch_size: int = 3, **task: Any) -> dict[str, float]:
    tasks, problems = parsed({"task": task}, where="tasks", seq_length=16)
    assert problems == []
    return {name.removeprefix("task/"): value for name, value in evaluate(folder, tasks, batch_size=batch_size).metrics.items()}


@pytest.mark.parametrize(("seq_length", "stride"), [(1, 1), (2, 1), (5, 2), (5, 5), (8, 3), (64, 32)])
def test_windows_score_every_token_once_with_the_context_that_fits(seq_length: int, stride: int) -> None:
    for length in range(2, 40):
        tokens = list(range(length))
        scored: list[int] = []
        for number, piece in enumerate(windows(tokens, seq_length, stride)):
            assert 1 <= piece.scored <= (stride if number else seq_length)
            assert len(piece.tokens) - 1 <= seq_length, "what the model is given"
            assert len(piece.tokens) - 1 == min(seq_length, piece.tokens[-1]), "no context is left out that fits"
            assert list(piece.tokens) == list(range(piece.tokens[0], piece.tokens[-1] + 1))
            scored += piece.tokens[-piece.scored :]
        assert scored == tokens[1:]


def test_likelihoods_are_those_of_plain_forward_passes_whatever_the_batch(folder: Path) -> None:
    model, tokenizer = load(folder, "cpu")
    texts = ["a", "some longer text", TEXT[:50], "be"]
    pieces = [ScoredTokens(document(tokenizer, text), max(1, len(text.encode()) // 2)) for text in texts]
    expected = []
    for piece in pieces:
        with torch.no_grad():
            logits = model(torch.tensor([piece.tokens])).logits[0].double().log_softmax(-1)
        last = range(len(piece.tokens) - piece.scored, len(piece.tokens))
        expected.append(sum(float(logits[place - 1, piece.tokens[place]]) for place in last))
    for size in (1, 2, 4):
        assert log_likelihoods(model, pieces, batch_size=size) == pytest.approx(expected, rel=1e-5)


def test_perplexity_by_hand(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in (TEXT, "short")))
    got = found(folder, kind="perplexity", path=str(file), column="body", seq_length=12, stride=4)
    model, tokenizer = load(folder, "cpu")
    nats, count = 0.0, 0
    for text in (TEXT, "short"):
        tokens = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        for place in range(1, len(tokens)):
            # The first window scores 12 tokens; later ones 4, with the 8 before them; the last one has all the context that fits.
            end = 13 if place <= 12 else 13 + -(-(place - 12) // 4) * 4
            end = min(end, len(tokens))
            with torch.no_grad():
                logits = model(torch.tensor([tokens[max(0, end - 13) : place]])).logits[0, -1]
            nats -= float(logits.double().log_softmax(-1)[tokens[place]])
            count += 1
    size = len((TEXT + "short").encode())
    assert got["tokens"] == count == size and got["bytes"] == size, "a token a byte, each scored once"
    assert got["nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_spaces_at_the_end_of_a_prompt_belong_to_what_follows(folder: Path) -> None:
    _, tokenizer = load(folder, "cpu")
    size = len("four")
    assert continuation(tokenizer, "two  ", "four", longest=99).scored == 2 + size
    assert continuation(tokenizer, "two", "four", longest=99) == ScoredTokens(tokenizer("twofour")["input_ids"], size)
    assert continuation(tokenizer, "", "four", longest=99) == ScoredTokens([1, *tokenizer("four")["input_ids"]], size)
    assert continuation(tokenizer, "two", "four", longest=5) == ScoredTokens(tokenizer("twofour")["input_ids"][-6:], size)
    assert continuation(tokenizer, "two", "four", longest=2).scored == 2


def test_multiple_choice_by_hand(folder: Path, quiz: Path) -> None:
    got = found(folder, kind="multiple_choice", path=str(quiz))
    model, tokenizer = load(folder, "cpu")
    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    for row in QUESTIONS:
        scores: dict[str, list[float]] = {name: [] for name in right}
        for choice in row["choices"]:  # type: ignore[attr-defined]
            total = log_likelihoods(model, [continuation(tokenizer, str(row["prompt"]), " " + choice, longest=999)], batch_size=1)[
                0
            ]
            for name, length in {"acc": 1, "acc_norm": len(choice), "acc_bytes": len(choice.encode())}.items():
                scores[name].append(total / length)
        for name in right:
            right[name] += scores[name].index(max(scores[name])) == row["answer"]
    assert {name: got[name] for name in right} == {name: number / len(QUESTIONS) for name, number in right.items()}
    assert got["questions"] == len(QUESTIONS)


@needs_harness
def test_perplexity_is_the_harness_s(smollm2: Path, folder: Path, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    (tmp_path / "text.txt").write_text(TEXT)
    for source in (folder, smollm2):
        model, tokenizer = load(source, "cpu")
        got = found(source, kind="perplexity", path=str(tmp_path / "text.txt"), seq_length=24, stride=24)
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=24, softmax_dtype="float32")
        (total,) = theirs.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)
        assert got["nats_per_token"] * got["tokens"] == pytest.approx(-total, rel=1e-5)
        assert got["tokens"] == len(tokenizer(TEXT)["input_ids"])


@needs_harness
def test_multiple_choice_is_the_harness_s_with_a_task_file_of_ones_own(smollm2: Path, quiz: Path, tmp_path: Path) -> None:
    (tmp_path / "quiz.yaml").write_text(
        f"""
task: megabridge_quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {quiz}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
"""
    )
    given = {"kind": "lm_eval", "tasks": ["megabridge_quiz"], "include_path": str(tmp_path)}
    theirs = found(smollm2, **given)
    ours = found(smollm2, kind="multiple_choice", path=str(quiz))
    for name in ("acc", "acc_norm", "acc_bytes", "acc_stderr"):
        assert ours[name] == pytest.approx(theirs[f"megabridge_quiz/{name}"]), name
    assert 0 < ours["acc"] <= 1, "these weights know something"
    limited = found(smollm2, **given, limit=2, num_fewshot=0)
    assert limited["megabridge_quiz/acc"] in (0, 0.5, 1)


@needs_harness
def test_names_that_the_harness_does_not_know_are_refused(tmp_path: Path) -> None:
    from megabridge.evaluation import harness

    tasks = {"mine": Harness(tasks=["hellaswag", "no_such_task"], include_path=str(tmp_path))}
    (problem,) = harness.problems(tasks)
    assert problem.startswith("mine.tasks: lm-evaluation-harness has no 'no_such_task'")


def test_the_longest_sequence_is_the_model_s(folder: Path, smollm2: Path) -> None:
    assert longest(folder, None) == TINY["max_position_embeddings"]
    assert longest(smollm2, None) >= 2048
