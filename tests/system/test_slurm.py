"""hydra/launcher=slurm on a real SLURM: a sweep with a failing point, a time limit, a preemption, a detach, a dry run."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megabridge.launchers import slurm, sweep
from tests.system import cluster

ROOT = Path(__file__).parents[2]
SWEEP = ("-m", "hydra/launcher=slurm", "hydra.launcher.poll_seconds=1", "model=tiny_llama", "platform=cpu", "hydra.sweep.dir=sweep")
TRAIN = (
    "data=random_tokens",
    "model=tiny_llama",
    "platform=cpu",
    "parallel=tp2",
    "callbacks=none",
    "+callbacks.hf_export._target_=megabridge.callbacks.hf_export.HFExport",
    "+callbacks.pace._target_=tests.system.pace.WaitsForSignal",
    "+callbacks.hf_export.logits_tokens=0",
    "logger=local",
    "recipe.steps=5",
    "recipe.seq_length=32",
)

if missing := cluster.missing():
    pytest.skip(f"SLURM is not run: this machine lacks {', '.join(missing)}", allow_module_level=True)
if os.geteuid() != 0:
    pytest.skip("SLURM is not run: its daemons need root here", allow_module_level=True)


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HYDRA_", "RANK", "WORLD_SIZE"))}
    with cluster.running(tmp_path_factory.mktemp("slurm")) as found:
        yield kept | found | {"PYTHONPATH": str(ROOT), "MEGABRIDGE_PLATFORM": "cpu"}


def run(*arguments: str, cwd: Path, environ: dict[str, str], timeout: float = 900) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megabridge.run", *arguments]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout)


def test_three_points_of_which_one_fails(tmp_path: Path, environ: dict[str, str]) -> None:
    """Over layouts: one point after the other is submitted, done or failed with its rank's own error; secrets reach no file."""
    recipe = "recipe.target=tests.support.launched:fail_under_tp"
    # The last is refused before anything is submitted.
    layouts, secret = "parallel=single,dp2,tp2,tp3", "+recipe.options.api_key=hunter2secret"
    done = run(*SWEEP, layouts, recipe, "recipe.steps=0", secret, "hydra.launcher.max_concurrent=2", cwd=tmp_path, environ=environ)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "megabridge: point 2 (parallel=tp2) failed: rank 1: the answer must be 42; use 42." in done.stderr
    assert "megabridge: point 3 (parallel=tp3) is refused: parallel.tp=3 must divide" in done.stderr
    assert "2 of 4 points are not done: 1 failed, 1 refused." in done.stderr and "Traceback" not in done.stderr
    assert "Error executing job" not in said
    assert re.search(r"point 1 \(parallel=dp2\): running on \S+ \(job \d+_1\)", done.stdout)
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert [(row["point"], row["parallel"], row["state"], row["objective"]) for row in rows] == [
        ("0", "single", "done", "1235.0"),
        ("1", "dp2", "done", "1236.0"),
        ("2", "tp2", "failed", ""),
        ("3", "tp3", "refused", ""),
    ]
    queue = tmp_path / "sweep" / "slurm"
    assert sorted(path.name for path in queue.iterdir()) == ["0", "1", "2", "points-0.sbatch", "points-1.sbatch"]
    assert "#SBATCH --array=1-2%2" in (queue / "points-1.sbatch").read_text()
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"hunter2secret" not in file.read_bytes(), file
    shown = subprocess.run(["squeue", "--noheader"], env=environ, capture_output=True, text=True)
    assert shown.stdout == ""


def results(run_dir: Path) -> dict[tuple[int, str], object]:
    """What a run of TRAIN computed, without the validation that only a resumed one has: losses, norms, and the exported file."""
    names = {"train/loss", "train/grad_norm", "validation/loss"}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    values: dict[tuple[int, str], object]
    values = {(row["step"], name): value for row in rows for name, value in row.items() if name in names}
    return values | {(0, "file"): (run_dir / "checkpoints" / "step_5" / "hf" / "model.safetensors").read_bytes()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, environ: dict[str, str]) -> dict[tuple[int, str], object]:
    """The results of TRAIN outside the queue."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    plain = run(*TRAIN, "run_dir=plain", cwd=folder, environ=environ)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    return results(folder / "plain")


@pytest.mark.parametrize("cause", ["time limit", "preemption"])
def test_a_run_that_is_stopped_goes_on_with_equal_bits(
    cause: str, tmp_path: Path, environ: dict[str, str], uninterrupted: dict[tuple[int, str], object]
) -> None:
    """The signal finds it before its third step, at the latest; saved, queued again, and ended as if nothing had been."""
    # The signal comes up to a minute before the time that was asked for, which is a minute after the start.
    limit = ("hydra.launcher.time=6", "hydra.launcher.signal_seconds=300") if cause == "time limit" else ()
    with (tmp_path / "said").open("w") as said:
        command = [sys.executable, "-m", "megabridge.run", *SWEEP, *TRAIN, *limit]
        attached = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=said, stderr=said)
        if cause == "preemption":
            # As early as can be: the ranks' processes are there and import.
            _until(attached, lambda: _started(tmp_path / "sweep" / "slurm" / "0") == 2)
            urgent = ["sbatch", "--partition=urgent", "--exclusive", "--time=5", "--output=/dev/null", "--wrap=sleep 1"]
            subprocess.run(urgent, cwd=tmp_path, env=environ, check=True)
        _until(attached, lambda: _hasten(environ))
    output = (tmp_path / "sweep" / "slurm" / "0" / "output.log").read_text()
    assert attached.returncode == 0, (tmp_path / "said").read_text() + output
    assert re.search(r"stopped by a signal after step [1-3], saved", output) and "resumed from" in output
    stopped = results(tmp_path / "sweep" / "0")
    assert all(name == "validation/loss" for _, name in set(stopped) - set(uninterrupted))
    assert {key: stopped[key] for key in uninterrupted} == uninterrupted
    (row,) = csv.DictReader((tmp_path / "sweep" / "sweep.csv").open())
    assert float(row["memory_gib"]) > 0.1 and float(row["tokens_per_second"]) > 0 and row["mfu"] == "", "a CPU has no known peak"


def _started(folder: Path) -> int:
    """How many tasks of the point run."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            count += f"-m\0megabridge.launchers.rank_task\0{folder}\0".encode() in (process / "cmdline").read_bytes()
    return count


def _queue(environ: dict[str, str], what: str) -> list[str]:
    return subprocess.run(["squeue", "--noheader", f"--format={what}"], env=environ, capture_output=True, text=True).stdout.split()


def _until(attached: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Waits for the condition, or until the command has ended."""
    until = time.monotonic() + 1500
    while attached.poll() is None and not condition():
        if time.monotonic() > until:
            attached.terminate()
            pytest.fail("the time was up")
        time.sleep(0.2)


def _hasten(environ: dict[str, str]) -> bool:
    """SLURM lets a requeued job wait two minutes, and as short a second attempt as the first might be stopped once more."""
    shown = _queue(environ, "%A %r")
    if shown[1:] == ["BeginTime"]:
        time.sleep(3)  # sooner, slurmd may take the new attempt's credential for the old one's, which it has just revoked
        subprocess.run(["scontrol", "update", f"JobId={shown[0]}", "TimeLimit=60", "StartTime=now"], env=environ, check=True)
    return False


def test_a_detached_sweep_is_collected(tmp_path: Path, environ: dict[str, str]) -> None:
    recipe = ("recipe.target=tests.support.launched:objective", "recipe.steps=0", "hydra.launcher.fetch=false")
    done = run(*SWEEP, "seed=5,6", *recipe, "hydra.launcher.detach=true", cwd=tmp_path, environ=environ)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "sweep"
    assert f"recipe=collect sweep={folder}" in done.stdout and "squeue --jobs=" in done.stdout
    assert {point.state for point in sweep.read(folder)} == {sweep.SUBMITTED} and not (folder / "sweep.csv").exists()
    os.environ["SLURM_CONF"] = environ["SLURM_CONF"]
    until = time.monotonic() + 600
    while any(point.state != sweep.DONE for point in slurm.collect(folder)) and time.monotonic() < until:
        time.sleep(2)
    done = run("recipe=collect", f"sweep={folder}", cwd=tmp_path, environ=environ)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [(row["rank"], row["seed"], row["objective"]) for row in rows] == [("1", "5", "6.0"), ("2", "6", "7.0")]


def test_a_dry_run_submits_nothing(tmp_path: Path, environ: dict[str, str]) -> None:
    done = run(
        *SWEEP,
        "seed=1,2,4",
        "parallel=tp2pp2",
        "hydra.launcher.dry_run=true",
        "hydra.launcher.ranks_per_node=2",
        cwd=tmp_path,
        environ=environ,
    )
    assert done.returncode == 0, done.stderr
    assert all(line in done.stdout for line in ("#SBATCH --array=0-2\n", "#SBATCH --nodes=2\n", "#SBATCH --ntasks-per-node=2\n"))
    assert not (tmp_path / "sweep" / "slurm").exists()
    script = tmp_path / "script"
    script.write_text(done.stdout.partition("\n")[2])
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_the_plain_batch_script(tmp_path: Path, environ: dict[str, str]) -> None:
    """launch/slurm.sbatch as it is, on a node without GPUs."""
    options = ["--wait", "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30"]
    arguments = ["model=tiny_llama", "platform=cpu", "parallel=tp2", "recipe.target=tests.support.launched:objective"]
    command = ["sbatch", *options, str(ROOT / "launch" / "slurm.sbatch"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    logs = "".join(file.read_text() for file in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert sorted(file.name for file in tmp_path.glob("outputs/*/*")) == [
        ".run.lock",
        "commands.txt",
        "config.yaml",
        "console.log",
        "rank0",
        "rank1",
    ]
