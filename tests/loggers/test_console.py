"""Lines for people, plain where there is no terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabridge.config.schema import Config, RecipeConfig
from megabridge.loggers.console import Console


def test_one_line_a_step_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    logger = Console()
    logger.start(Path("/runs/1"), Config(recipe=RecipeConfig(steps=9)))
    logger.log(3, {"train/loss": 1.23456, "train/learning_rate": 1e-5, "train/loss_tokens": 7.0, "mine/[bold]": 2.0})
    logger.log(3, {"checkpoint/seconds": 1.0})
    logger.log(4, {"train/tokens_per_second": 1234.5, "train/padding": 0.124, "train/memory_gib": 2.0})
    logger.log(5, {"train/tokens_per_second": 1234.5, "train/padding": 0.004})
    logger.say("[red]as it is[/red] " + "x" * 200)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("run directory /runs/1")
    assert lines[1].endswith("step 3/9  loss 1.2346  lr 1.00e-05  mine/[bold] 2")
    assert lines[2].endswith("step 4/9  tokens/s 1,234  pad 12%  GiB 2.0")
    assert lines[3].endswith("step 5/9  tokens/s 1,234")
    assert lines[4].endswith("[red]as it is[/red] " + "x" * 200)
    assert len(lines) == 5 and "\x1b" not in "".join(lines)


def test_a_few_rows_of_a_table_on_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(3, "generations", [{"prompt": "a\nb", "text": "c"}] * 5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["generations  prompt: a b  text: c"] * 2 + [
        "generations  ... and 3 more"
    ]
