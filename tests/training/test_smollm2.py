"""The real model on real text: a lower validation loss than the source's, and the same curve under every layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SHORT = "recipe.steps=3 recipe.seq_length=96 recipe.global_batch_size=2 callbacks=none logger=local checkpoint.save_at_end=false"


@pytest.mark.skipif("MEGABRIDGE_CURVES" not in os.environ, reason="eight runs of the real model: make test-curves")
@pytest.mark.parametrize("experiment", ["smollm2_sft_export", "smollm2_lora"])
def test_smollm2_learns_the_same_under_every_layout(smollm2: Path, tmp_path: Path, experiment: str) -> None:
    losses: dict[str, list[float]] = {}
    for layout in ("single", "tp3", "pp2", "dp2"):
        command = [f"experiment={experiment}", f"parallel={layout}", f"run_dir={tmp_path / layout}", f"model.path={smollm2}"]
        done = subprocess.run(
            [sys.executable, "-m", "megabridge.run", *command, *SHORT.split()],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [json.loads(line) for line in (tmp_path / layout / "metrics.jsonl").read_text().splitlines()]
        losses[layout] = [row["train/loss"] for row in rows if "train/loss" in row]
        before, after = [row["validation/loss"] for row in rows if "validation/loss" in row]
        assert after < before
        losses[layout].append(after)
    assert all(len(values) == 4 for values in losses.values())
    for values in losses.values():
        assert values == pytest.approx(losses["single"], abs=1e-4)
