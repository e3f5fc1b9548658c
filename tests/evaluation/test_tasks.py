"""Tasks are refused as a whole, with every fault and the line of every bad row, before anything is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megabridge.config import optional_packages
from megabridge.evaluation import parsed, specs
from megabridge.evaluation.tasks import MultipleChoice, Perplexity


def problems(given: Any) -> str:
    return "\n".join(parsed(given, where="tasks", seq_length=16)[1])


def test_good_tasks_have_every_setting_and_come_back_the_same(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "quiz.jsonl").write_text('{"question": "\u2028?", "choices": ["a", "b"], "answer": 1}\n\n')
    given = {
        "held_out": {"kind": "perplexity", "path": str(tmp_path / "text.txt")},
        "quiz": {"kind": "multiple_choice", "path": str(tmp_path / "quiz.jsonl")},
        "texts": {"kind": "generations", "prompts": ["hello"]},
    }
    tasks, found = parsed(given, where="tasks", seq_length=16)
    assert found == []
    assert isinstance(tasks["held_out"], Perplexity) and tasks["held_out"].seq_length == 16
    assert isinstance(tasks["quiz"], MultipleChoice) and tasks["quiz"].delimiter == " "
    assert parsed(specs(tasks), where="tasks", seq_length=99) == (tasks, [])


def test_every_bad_row_is_named_at_once_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "quiz.jsonl"
    rows = [
        b'{"prompt": "p", "choices": ["a", "b"], "answer": 0}',
        b'{"prompt": "p", "choices": ["a", "b"], "answer": 2}',
        b"",
        b'{"prompt": 1, "choices": ["a"], "answer": true}',
        b"not json",
        b"[1]",
        b'{"prompt": "\xff", "choices": ["a", "b"], "answer": 0}',
        b"[" * 100_000,
    ]
    file.write_bytes(b"\n".join(rows))
    found = problems({"quiz": {"kind": "multiple_choice", "path": str(file)}})
    assert f"tasks.quiz: 6 rows of {file} can't be used" in found
    for line, why in {
        2: "'answer' must be the index of the right choice, from 0, not 2",
        4: "'prompt' (or 'question') must be a text, not 1, and 'choices' must be a list of at least two",
        5: "must be JSON",
        6: "must be a JSON object, not list",
        7: "must be UTF-8",
        8: "must be JSON",
    }.items():
        assert f"{file}:{line}: {why}" in found
    assert f"{file}:1:" not in found


def test_all_faults_of_all_tasks_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        optional_packages.EXTRAS,
        "lm_eval",
        optional_packages.Extra("lm_eval_is_not_there", "kind lm_eval", "pip install 'megabridge[eval]'"),
    )  # type: ignore[arg-type]
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "good.txt").write_text("text")
    good = str(tmp_path / "good.txt")
    found = problems(
        {
            "a": {"kind": "perplexty", "path": "x"},
            "b": {"kind": "perplexity", "path": str(tmp_path / "missing.txt")},
            "c": {"kind": "perplexity", "path": good, "strid": 3},
            "d": {"kind": "perplexity", "path": good, "stride": 17},
            "e": {"kind": "perplexity", "path": good, "stride": 0},
            "f": {"kind": "perplexity", "path": good, "seq_length": "many"},
            "g": {"kind": "multiple_choice", "path": str(tmp_path / "empty.jsonl")},
            "h": {"kind": "multiple_choice"},
            "i": {"kind": "generations"},
            "j": {"kind": "lm_eval", "tasks": [], "include_path": str(tmp_path / "nowhere")},
            "k": 5,
            "l/m": {"kind": "generations", "prompts": ["x"]},
        }
    )
    for part in (
        "tasks.a.kind='perplexty' is not one of perplexity, multiple_choice, lm_eval, generations; did you mean 'perplexity'?",
        "tasks.b: path=" + str(tmp_path / "missing.txt") + " can't be read: No such file",
        "tasks.c.strid: perplexity has no such setting; did you mean 'stride'?",
        "tasks.d: stride=17 must be at most seq_length=16",
        "tasks.e.stride=0 must be at least 1",
        "tasks.f.seq_length: Value 'many'",
        "tasks.g: " + str(tmp_path / "empty.jsonl") + " must hold rows",
        "tasks.h.path must be given",
        "tasks.i: prompts or path must be given",
        "tasks.j: tasks must name at least one",
        "tasks.j: include_path=",
        "kind lm_eval needs the package lm_eval_is_not_there, which is not installed; pip install 'megabridge[eval]'",
        "tasks.k=5 must be a task with a kind",
        "tasks.l/m: the name must consist of letters",
    ):
        assert part in found, part


@pytest.mark.parametrize("given", [None, {}, [], "perplexity"])
def test_no_tasks_are_a_mistake(given: Any) -> None:
    assert "must map names to tasks" in problems(given)
