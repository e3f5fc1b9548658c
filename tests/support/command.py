"""Commands in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


# Any of these in the parent is a start-up of seconds instead of half a one.
HEAVY = ("torch", "megatron", "transformers", "datasets", "wandb", "numpy")


WITHOUT_TORCH = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {HEAVY!r}:
            raise SystemExit(f'{{name}} was imported')
sys.meta_path.insert(0, Refuse())
from megabridge.run import main
main()
"""


def environ(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HYDRA_", "RANK", "WORLD_SIZE"))}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | more


def command(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process that can't import torch. For what ends before workers start."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        cwd=cwd,
        env=environ(**(env or {})),
        capture_output=True,
        text=True,
        timeout=60,
    )


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**clean, "MEGABRIDGE_PLATFORM": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )


QUEUED = """
import sys
from megabridge.launchers import local, rank_task
local.WORKER = "tests.support.worker_program"
sys.exit(rank_task.main())
"""
