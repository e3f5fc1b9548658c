"""Two devices beside one, by the command that users give: losses, bytes, resuming, and one of two ranks killed.

Runs on two CUDA devices under NCCL by make test-gpu; with MEGABRIDGE_TWO_RANKS=1 the same on the CPU under gloo.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ON_CPU = os.environ.get("MEGABRIDGE_TWO_RANKS") == "1"
PLATFORM = "cpu" if ON_CPU else "cuda"
HAS_TWO = torch.cuda.device_count() >= 2 and os.environ["MEGABRIDGE_PLATFORM"] == "cuda"
pytestmark = pytest.mark.skipif(not (ON_CPU or HAS_TWO), reason="needs two CUDA devices and make test-gpu")

DENSE, MIXTURE = ("model=tiny_llama",), ("model=tiny_moe",)
TRAIN = (
    f"platform={PLATFORM}", "data=random_tokens", "logger=local", "recipe.seq_length=64", "recipe.global_batch_size=8",
    "optimizer.lr=1e-3", "scheduler=constant", "backend=torch",
    "callbacks=none", "+callbacks.hf_export._target_=megabridge.callbacks.hf_export.HFExport",
    "+callbacks.hf_export.logits_tokens=0",
)  # fmt: skip
LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tp2": (DENSE, ("parallel.tp=2",)),
    "tp2-sequence": (DENSE, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "pp2": (DENSE, ("parallel.pp=2",)),
    "pp2vpp2": (DENSE, ("parallel.pp=2", "parallel.vpp=2")),
    "dp2": (DENSE, ("parallel.dp=2",)),
    "dp2-overlap": (DENSE, ("parallel.dp=2", "optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true")),
    "ep2": (MIXTURE, ("parallel.ep=2", "parallel.dp=2")),
    "etp2": (MIXTURE, ("parallel.tp=2", "parallel.etp=2", "parallel.sequence_parallel=true")),
}


def command(run_dir: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "megabridge.run", *TRAIN, f"run_dir={run_dir}", *arguments]


def losses(run_dir: Path, *arguments: str) -> list[float]:
    """Of all steps in the run directory, after one more run there."""
    done = subprocess.run(command(run_dir, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@dataclass
class Alone:
    """What one device did: the weights it began with, six steps of which the third was saved, and their losses."""

    source: Path
    run_dir: Path
    losses: list[float]

    @property
    def model(self) -> tuple[str, ...]:
        return f"model.path={self.source}", "model.load_weights=true", "model.tokenizer=null"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Alone]:
    made = {}
    for model in (DENSE, MIXTURE):
        folder = tmp_path_factory.mktemp("alone")
        losses(folder / "begin", *model, "recipe.steps=1")
        one = Alone(folder / "begin/checkpoints/step_1/hf", folder / "run", [])
        one.losses = losses(one.run_dir, *model, *one.model, "recipe.steps=6", "checkpoint.save_every=3")
        made[model] = one
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_resuming_and_bytes(layout: str, tmp_path: Path, alone: dict[tuple[str, ...], Alone]) -> None:
    kind, parallel = LAYOUTS[layout]
    one = alone[kind]
    given = *kind, *one.model, *parallel
    assert len(one.losses) == 6
    whole = losses(tmp_path / "whole", *given, "recipe.steps=6", "checkpoint.save_at_end=false")
    assert whole == pytest.approx(one.losses, abs=1e-4)

    # What one device saved goes on under two.
    shutil.copytree(one.run_dir, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step_6")
    resumed = losses(tmp_path / "resumed", *given, "recipe.steps=6", "checkpoint.resume=auto")
    assert resumed[-3:] == pytest.approx(one.losses[3:], abs=1e-4)

    # The weights come out of both with the same bytes.
    convert = "recipe=convert", f"conversion.output={tmp_path / 'out'}"
    converted = command(tmp_path / "convert", *given, *convert)
    done = subprocess.run(converted, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = sorted(file.name for file in one.source.glob("*.safetensors"))
    assert names and all((tmp_path / "out/hf" / name).read_bytes() == (one.source / name).read_bytes() for name in names)


def test_rows_that_two_ranks_tokenise_together(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes" * (n % 9 + 1)}] for n in range(300)]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    given = *DENSE, "data=chat", f"data.path={file}", "recipe.steps=4", "checkpoint.save_at_end=false"
    single = losses(tmp_path / "single", *given)
    assert len(single) == 4
    assert losses(tmp_path / "two", *given, "parallel.dp=2") == pytest.approx(single, abs=1e-4)


@pytest.mark.parametrize("parallel", ["tp", "pp", "dp"])
def test_a_killed_rank_ends_the_other(tmp_path: Path, parallel: str) -> None:
    endless = [*DENSE, f"parallel.{parallel}=2", "recipe.steps=100000", "checkpoint.save_at_end=false", "recipe.log_every=5"]
    with subprocess.Popen(
        command(tmp_path / "run", *endless), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        try:
            assert run.stdout is not None
            for line in run.stdout:
                if "step 10/" in line:
                    break
            os.kill(ranks_of(run.pid)[-1], signal.SIGKILL)
            begin = time.monotonic()
            said = run.stdout.read()
            run.wait(timeout=60)
        finally:
            run.kill()
    assert time.monotonic() - begin < 30 and run.returncode != 0
    assert said.count("ended by signal SIGKILL") == 1, said


def ranks_of(command: int) -> list[int]:
    """Processes of the ranks that the command started: its worker processes that have none of their own, oldest first."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"megabridge.worker" in (folder / "cmdline").read_bytes():
                parents[int(folder.name)] = int((folder / "status").read_text().partition("\nPPid:\t")[2].split()[0])
        except OSError:
            continue

    def is_below(process: int) -> bool:
        return process == command or (process in parents and is_below(parents[process]))

    return sorted(process for process in parents if is_below(process) and process not in parents.values())
