"""Lines for people, plain where there is no terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megabridge.config.schema import Config, RecipeConfig
from megabridge.loggers.console import Console
from megabridge.storage import start_lines


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
    assert re.search(r"\] step 3/9  loss 1\.2346  \d+ s left  lr 1\.00e-05  mine/\[bold\] 2$", lines[1])
    assert lines[2].endswith("step 4/9  1,234 tokens/s  pad 12%  2.0 GiB")
    assert lines[3].endswith("step 5/9  1,234 tokens/s")
    assert lines[4].endswith("[red]as it is[/red] " + "x" * 200)
    assert len(lines) == 5 and "\x1b" not in "".join(lines)


def test_a_few_rows_of_a_table_on_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(3, "generations", [{"prompt": "a\nb", "text": "c"}] * 5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["generations  prompt: a b  text: c"] * 2 + [
        "generations  ... and 3 more"
    ]


def test_lines_of_steps_fit_a_terminal_and_say_what_means_something(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    metrics = {
        "train/loss": 12.34567,
        "train/learning_rate": 1e-5,
        "train/tokens_per_second": 123_456.7,
        "train/tflops_per_device": 0.01,
        "train/mfu": 0.4012,
        "train/memory_gib": 79.9,
        "train/grad_norm": 1234.5,
        "train/step_seconds": 100.0,
        "router/layer_1/imbalance": 1.5,
    }
    logger = Console()
    logger.start(tmp_path, Config(recipe=RecipeConfig(steps=10_000)))
    for step, elapsed in ((1, 130.0), (101, 10_130.0), (10_000, 1_000_000.0)):
        monkeypatch.setattr(start_lines, "elapsed", lambda elapsed=elapsed: elapsed)
        logger.log(step, metrics)
    logger.log(10_000, {"validation/loss": 2.0, "validation/perplexity": 7.389, "validation/tokens": 9e6})
    lines = capsys.readouterr().out.splitlines()[1:]
    assert all(len(line) <= 80 for line in lines), lines
    assert lines[0].startswith("[  130.0 s] step 1/10000  loss 12.3457  277:45:00 left  lr 1.00e-05")
    assert lines[1].startswith("[  2:48:50] step 101/10000  loss 12.3457  274:58:20 left  lr 1.00e-05")
    assert " left" not in lines[2] and lines[3].endswith("] step 10000/10000  validation loss 2.0000  perplexity 7.389")
    assert "TFLOP/s" not in "".join(lines)
    assert (tmp_path / "console.log").read_text().splitlines()[1:] == lines
    monkeypatch.delenv("MEGABRIDGE_CONSOLE")
