"""import_ckpt and export_ckpt in bounded memory: a model may be larger than what a process may hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import ROOT

MIB = 1 << 20


def convert(folder: Path, gigabytes: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.memory", str(folder), str(gigabytes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert seen["same"] == ["config.json", "model.safetensors"], "there and back, byte for byte"
    assert seen["weights"] > 0.9e9 * gigabytes
    return seen


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    seen = convert(tmp_path / "model", 0.5)
    # A native checkpoint is read a tensor at a time, which torch.load holds twice.
    allowed = seen["imports"] + 2 * seen["largest"] + 128 * MIB
    assert allowed < seen["imports"] + 0.6 * seen["weights"]
    assert seen["import"] < allowed and seen["export"] < allowed, seen


@pytest.mark.skipif("MEGABRIDGE_MEMORY_GB" not in os.environ, reason="make test-memory; writes four times the model to the disk")
def test_a_model_of_twice_the_memory(tmp_path: Path) -> None:
    gigabytes = float(os.environ["MEGABRIDGE_MEMORY_GB"])
    seen = convert(tmp_path / "model", gigabytes)
    assert max(seen["import"], seen["export"]) < gigabytes / 2 * 1e9, seen
