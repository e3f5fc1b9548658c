"""metrics.jsonl: whole lines, numbers only, one file over a run's lives."""

from __future__ import annotations

import json
from pathlib import Path

from megabridge.config.schema import Config
from megabridge.loggers.jsonl import JsonLines
from megabridge.loggers.metrics_file import read


def test_lines_are_json_also_for_what_is_not_a_number(tmp_path: Path) -> None:
    logger = JsonLines()
    logger.start(tmp_path, Config())
    logger.log(3, {"train/loss": 1.5, "train/grad_norm": float("nan"), "x": float("inf")})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())  # before finish: a killed run keeps it
    assert row["step"] == 3 and row["train/loss"] == 1.5
    assert row["train/grad_norm"] is None and row["x"] is None
    logger.finish()


def test_a_resumed_run_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    logger = JsonLines()
    logger.start(tmp_path, Config())
    logger.log(3, {"a": 4.0})
    logger.finish()
    assert [(row["step"], row["a"]) for row in read(tmp_path)] == [(1, 2), (3, 4.0)]


def test_a_table_has_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "generations.jsonl").write_text('{"step": 1, "te')
    logger = JsonLines()
    logger.start(tmp_path, Config())
    logger.table(2, "generations", [{"text": "one\ntwo"}, {"text": "\u2028"}])
    logger.finish()
    lines = (tmp_path / "generations.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[1:-1]] == [{"step": 2, "text": "one\ntwo"}, {"step": 2, "text": "\u2028"}]
    assert (tmp_path / "metrics.jsonl").read_text() == ""
