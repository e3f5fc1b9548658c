"""Every shell script of the project passes shellcheck; the plain batch script runs under SLURM as it is written."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").iterdir()), ROOT / ".ci" / "run", ROOT / ".ci" / "system-packages"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    checked = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_launch_scripts_are_short() -> None:
    assert len(SCRIPTS) >= 4
    assert not [path.name for path in SCRIPTS[:-2] if len(path.read_text().splitlines()) > 30]
