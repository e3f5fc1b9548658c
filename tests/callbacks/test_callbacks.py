"""Callbacks apart from whole recipes (tests/recipes): what they draw, and what they notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.rank_server import RankError, RankServer

CASES = "tests.support.callbacks"


def test_the_bar_is_drawn_on_a_terminal_only(ranks: RankServer) -> None:
    ((terminal, plain),) = ranks.run(f"{CASES}:bars")
    assert "training  loss 1.5000" in terminal and "3/3" in terminal
    assert plain == ""


def test_parity_notices_one_changed_value(ranks: RankServer, tmp_path: Path) -> None:
    (figures,) = ranks.run(f"{CASES}:changed_after_import", kwargs={"folder": str(tmp_path / "hf")})
    same, changed = figures
    assert same["import/logits_max_abs_diff"] < 1e-4
    assert changed["import/logits_max_abs_diff"] > 1e-3


def test_an_export_without_a_bridge_is_refused_before_the_first_step(ranks: RankServer, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"checkpoint.hf=true needs a bridge"):
        ranks.run(f"{CASES}:without_bridge", kwargs={"run_dir": str(tmp_path)})
