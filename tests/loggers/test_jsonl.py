"""metrics.jsonl: whole lines, numbers only, one file over a run's lives."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.loggers import jsonl
from megabridge.loggers.jsonl import JsonLines
from megabridge.storage.metrics_file import read
from tests.support.limits import largest_file


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


def test_lines_wait_for_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = JsonLines()
    logger.start(tmp_path, Config())
    logger.log(0, {"a": 0.5})
    file = tmp_path / "metrics.jsonl"
    with largest_file(file.stat().st_size + 10):
        for step in (1, 2, 3):
            logger.log(step, {"a": 0.5})
        assert not file.read_bytes().endswith(b"\n")  # a part of a line fitted
        (said,) = capsys.readouterr().out.splitlines()
        assert said == f"{file} can't be written (File too large); the run goes on, and its lines wait until they can be"
    logger.table(4, "texts", [{"text": "one"}])
    logger.log(4, {"a": 0.5})
    assert capsys.readouterr().out == f"{file} can be written again; nothing is missing\n"
    assert [(row["step"], row["a"]) for row in read(tmp_path)] == [(step, 0.5) for step in range(5)]

    monkeypatch.setattr(jsonl, "MOST", 100)
    with largest_file(file.stat().st_size):
        for step in range(5, 15):
            logger.log(step, {"a": 0.5})
    logger.log(15, {"a": 0.5})
    steps = [int(row["step"] or 0) for row in read(tmp_path)]
    missing = 16 - len(steps)
    assert missing > 0 and steps[-1] == 15
    assert capsys.readouterr().out.splitlines()[1:] == [f"{file} can be written again; {missing} lines are missing in it"]
    with largest_file(file.stat().st_size):
        logger.log(16, {"a": 0.5})
        logger.finish()
    assert capsys.readouterr().out.endswith(f"{file} is without the last 1 lines: there was no room for them\n")


def test_a_disk_that_is_full_from_the_start_costs_no_run_and_what_is_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    logger = JsonLines()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        logger.start(tmp_path, Config())
        logger.log(1, {"a": 0.5})
    logger.log(2, {"a": 0.5})
    logger.finish()
    assert [row["step"] for row in read(tmp_path)] == [1, 2] and capsys.readouterr().out.count("No space left on device") == 1

    for name, make in (("pipe", os.mkfifo), ("folder", os.mkdir)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "metrics.jsonl")
        with pytest.raises(ConfigError, match=r"metrics\.jsonl must be a file that can be written, but: "):
            JsonLines().start(tmp_path / name, Config())
