"""The batch script, and the file that the ranks of a queued point read."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megabridge.errors import ConfigError, MegabridgeError
from megabridge.launchers import job_files, slurm
from megabridge.launchers.processes.outcome import Done, Failure
from megabridge.launchers.settings import SlurmSettings
from megabridge.launchers.slurm_script import RANK_TASK, JobShape, hidden_environment, ranges, script
from megabridge.launchers.sweep import SweepRun


@pytest.mark.parametrize(
    ("world", "platform", "most", "shape"),
    [
        (1, "cuda", 8, (1, 1, 1)),
        (16, "cuda", 8, (2, 8, 8)),
        (12, "cuda", 8, (2, 6, 6)),
        (6, "cpu", 4, (2, 3, 0)),
        (7, "cuda", 4, (7, 1, 1)),
    ],
)
def test_nodes_follow_from_ranks(world: int, platform: str, most: int, shape: tuple[int, int, int]) -> None:
    found = JobShape.of(world, platform, most)
    assert (found.nodes, found.ranks_per_node, found.gpus_per_node) == shape and found.ranks == world


def test_no_rank_on_a_node_is_refused() -> None:
    with pytest.raises(ConfigError, match="ranks_per_node=0 must be at least 1"):
        JobShape.of(2, "cpu", 0)


def test_ranges() -> None:
    assert ranges([4, 0, 1, 2, 7, 8]) == "0-2,4,7-8"


def test_every_setting_is_in_the_script_and_no_secret(tmp_path: Path) -> None:
    settings = SlurmSettings(
        partition="big",
        account="me",
        qos="high",
        constraint="h100",
        time="4:00:00",
        memory="200G",
        cpus_per_task=12,
        gres="gpu:h100",
        exclusive=True,
        max_concurrent=3,
        extra=["--mail-type=END"],
        container_image="/images/one two.sqsh",
        container_mounts=["/data:/data", "/home"],
        modules=["cuda/12"],
        environment={"NCCL_DEBUG": "WARN all", "HF_TOKEN": "hunter2"},
        setup=["ulimit -l unlimited"],
        srun=["--mpi=none"],
        signal_seconds=300,
    )
    text = script(settings, JobShape(2, 8, 8), [0, 1, 2, 5], queue=tmp_path / "a b", python="/opt/python", cwd=tmp_path)
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert options[1:] == [
        "--array=0-2,5%3",
        "--partition=big",
        "--account=me",
        "--qos=high",
        "--constraint=h100",
        "--time=4:00:00",
        "--nodes=2",
        "--ntasks=16",
        "--ntasks-per-node=8",
        "--cpus-per-task=12",
        "--mem=200G",
        "--gres=gpu:h100:8",
        "--signal=USR1@300",
        "--open-mode=append",
        "--export=ALL",
        f"--chdir={tmp_path}",
        f'--output="{tmp_path}/a b/%a/output.log"',
        "--requeue",
        "--exclusive",
        "--mail-type=END",
    ]
    for line in (
        "module load cuda/12",
        "export NCCL_DEBUG='WARN all'",
        "export HF_HUB_OFFLINE=1",
        "ulimit -l unlimited",
        "srun --ntasks=16 --ntasks-per-node=8 --kill-on-bad-exit=1 --cpus-per-task=12 '--container-image=/images/one two.sqsh' "
        "--container-mounts=/data:/data,/home --mpi=none /opt/python -ISc " + shlex.quote(RANK_TASK) + ' "$point" || status=$?',
    ):
        assert line in text.splitlines()
    assert "hunter2" not in text and hidden_environment(settings) == {"HF_TOKEN": "hunter2"}
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "scontrol" not in script(SlurmSettings(requeue=False), JobShape(1, 1, 0), [0], queue=tmp_path, python="p", cwd=tmp_path)
    assert "--gpus-per-node=8" in script(SlurmSettings(), JobShape(1, 8, 8), [0], queue=tmp_path, python="p", cwd=tmp_path)


@pytest.mark.parametrize(("line", "status"), [("true", 7), ("no_such_module load cuda", 127), ('echo "$NEVER_SET"', 7)])
def test_what_comes_before_the_ranks_must_work(tmp_path: Path, line: str, status: int) -> None:
    """A failing line of setup or module load ends the job before its ranks start; else its status is that of srun."""
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\necho ranks start\nexit 7\n")
    srun.chmod(0o755)
    text = script(SlurmSettings(setup=[line]), JobShape(1, 1, 0), [0], queue=tmp_path, python="python", cwd=tmp_path)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "0"}
    done = subprocess.run(["bash", "-c", text], env=environ, capture_output=True, text=True)
    assert (done.returncode, "ranks start" in done.stdout) == (status, status == 7), done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_script_passes_shellcheck(tmp_path: Path) -> None:
    text = script(SlurmSettings(), JobShape(1, 8, 8), [0], queue=tmp_path, python="python", cwd=tmp_path)
    checked = subprocess.run(["shellcheck", "-"], input=text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout


def test_secrets_travel_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE", "tok-123456789")
    content = {
        "logger": {"w": {"api_key": "hunter2", "entity": "${oc.env:SERVICE}"}},
        "list": ["a", "${logger.w.entity}"],
        "seed": 3,
    }
    cfg = OmegaConf.create(content)
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    secrets = job_files.write(tmp_path, values=values, cfg=cfg, platform="cpu")
    text = (tmp_path / job_files.FILE).read_text()
    assert "hunter2" not in text and "tok-" not in text and len(secrets) == 2
    assert job_files.read(tmp_path, secrets) == (values, "cpu")
    with pytest.raises(MegabridgeError, match=r"MEGABRIDGE_SECRET_.* is not in the job's environment"):
        job_files.read(tmp_path, {})
    with pytest.raises(MegabridgeError, match=r"point\.json must say what the point runs"):
        job_files.read(tmp_path / "none", {})


def test_how_a_point_ended(tmp_path: Path) -> None:
    point = SweepRun(0, [], "", world_size=2)

    def ended(state: str = "COMPLETED") -> object:
        return slurm.outcome(tmp_path, point, state)

    assert "ended it (TIMEOUT), and its ranks left no report" in str(ended("TIMEOUT"))
    job_files.leave(tmp_path, 0, Done(1.5))
    (tmp_path / "rank-1.json").write_text('{"done": ')
    assert "left no report" in str(ended())
    job_files.leave(tmp_path, 1, Done())
    assert ended() == Done(1.5) and ended("") == Done(1.5) and "NODE_FAIL" in str(ended("NODE_FAIL"))
    (tmp_path / job_files.STOPPED).touch()
    assert "stopped by a signal after a save and not queued again" in str(ended("TIMEOUT"))
    job_files.leave(tmp_path, 1, Failure(1, -9, "was ended by SIGKILL", is_silent=True))
    job_files.leave(tmp_path, 0, Failure(0, 1, "connection closed", "Traceback"))
    found = ended("FAILED")
    assert isinstance(found, Failure) and found.rank == 1
    assert json.loads((tmp_path / "rank-1.json").read_text())["failure"]["exit_code"] == -9
