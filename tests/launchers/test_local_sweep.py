"""hydra/launcher=local: real points in real processes."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

from tests.support.command import command
from tests.support.rank_server import RankServer

SWEEP = ("-m", "hydra/launcher=local", "model=tiny_llama", "platform=cpu", "hydra.sweep.dir=sweep")


def test_points_at_once_of_which_one_fails_and_one_is_refused(ranks: RankServer, tmp_path: Path) -> None:
    points = ("parallel=single,tp2,tp3", "recipe.target=tests.support.launched:fail_under_tp", "hydra.launcher.at_once=2")
    done = ranks.program([*SWEEP, *points], cwd=tmp_path)
    err = done.stderr
    assert done.returncode == 1, done.stdout + err
    assert "point 1 (parallel=tp2) failed: rank 1: the answer must be 42" in err
    assert "point 2 (parallel=tp3) is refused: parallel.tp=3 must divide" in err and "Traceback" not in err
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert [(row["point"], row["state"], row["objective"]) for row in rows] == [
        ("0", "done", "1235.0"),
        ("1", "failed", ""),
        ("2", "refused", ""),
    ]
    assert (tmp_path / "sweep" / "0" / "output.log").is_file() and not (tmp_path / "sweep" / "2").exists()


def test_a_signal_ends_the_points_that_run(ranks: RankServer, tmp_path: Path) -> None:
    points = ("seed=1,2,3", "recipe.target=tests.support.launched:wait", "hydra.launcher.at_once=2")
    done = ranks.program([*SWEEP, *points], cwd=tmp_path, signalled=(signal.SIGINT, "sweep/[01]/waits0", 2))
    pids = [int(pid) for number in "01" for pid in (tmp_path / "sweep" / number / "waits0").read_text().split()]
    assert done.returncode == 130 and not (tmp_path / "sweep" / "2" / "waits0").exists()
    assert not [
        pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    ]


def test_what_cannot_be_is_said_without_torch(tmp_path: Path) -> None:
    for launcher in ("local", "slurm"):
        answer = command(f"hydra/launcher={launcher}", "model=tiny_llama", cwd=tmp_path)
        assert answer.returncode == 2 and f"hydra/launcher={launcher} starts the points of a sweep" in answer.stderr
        assert "add -m" in answer.stderr
    answer = command(*SWEEP, "seed=1,2", "hydra.launcher.at_onse=2", cwd=tmp_path)
    assert (
        answer.returncode == 2 and "unknown key 'hydra.launcher.at_onse'; did you mean 'hydra.launcher.at_once'?" in answer.stderr
    )
    answer = command(*SWEEP, "seed=1,2", "hydra.launcher.at_once=0", cwd=tmp_path)
    assert answer.returncode == 2 and "hydra.launcher.at_once=0 must be at least 1" in answer.stderr
    slurm = command(
        "-m", "hydra/launcher=slurm", "seed=1,2", "model=tiny_llama", "hydra.launcher.fetch=false", cwd=tmp_path, env={"PATH": ""}
    )
    assert slurm.returncode == 2 and "needs sbatch, which is not on PATH" in slurm.stderr
