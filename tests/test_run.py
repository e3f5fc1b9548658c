"""The command: errors in one line, no torch in the parent, sweeps, ranks of torchrun and srun, an installed wheel."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from megabridge.version import VERSION
from tests.support.command import ROOT, WITHOUT_TORCH, command, environ
from tests.support.free_port import free_port

RECIPE = "recipe.target=tests.support.launched:objective"


def start(*arguments: str, cwd: Path, recipe: str = "objective", **more: str) -> subprocess.Popen[str]:
    target = f"recipe.target=tests.support.launched:{recipe}"
    return subprocess.Popen(
        [sys.executable, "-m", "megabridge.run", *arguments, "model=tiny_llama", target],
        cwd=cwd,
        env=environ(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help_and_cfg_answer_without_torch(tmp_path: Path) -> None:
    shown = command("--help", cwd=tmp_path)
    assert shown.returncode == 0 and "tiny_llama" in shown.stdout and "megabridge.run" in shown.stdout
    shown = command("--cfg", "job", "optimizer.lr=0.25", cwd=tmp_path)
    assert shown.returncode == 0 and yaml.safe_load(shown.stdout)["optimizer"]["lr"] == 0.25
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("optimizr.lr=1", "unknown key 'optimizr.lr'; did you mean 'optimizer.lr'?"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("stepz=3", "unknown key 'stepz'; did you mean 'recipe.steps'?"),
        ("modl=tiny_llama", "unknown key 'modl'; did you mean 'model'?"),
        ("callbacks.hf_exprt=null", "unknown key 'callbacks.hf_exprt'; did you mean 'callbacks.hf_export'? To add it"),
        ("optimizer.lr=abc", "optimizer.lr: 'abc' must be a number."),
        ("parallel.tp=1.5", "parallel.tp: '1.5' must be a whole number."),
        ("model=tiny_lama", "model=tiny_lama does not exist; did you mean 'tiny_llama'? It is one of: afm_4_5b, auto, "),
        ("parallel=tp4", "Any other size: parallel.tp=..."),
        ("experiment=null", "must be a string or a list"),
        ("a=[", "can't read the override 'a=['"),
        ("optimizer.name=adma", "optimizer.name='adma' is not one of adam, sgd; did you mean 'adam'?"),
        ("seed=${oc.env:NOT_SET}", "Environment variable 'NOT_SET' not found"),
        ("data._target_=os.system +data.x._target_=os.system", "data.x._target_='os.system' is not allowed"),
        ("model=llama32_1b parallel=tp8pp2 platform=cuda", "needs 16 GPUs, but this host has"),
    ],
)
def test_a_mistake_is_one_message_without_torch(tmp_path: Path, arguments: str, message: str) -> None:
    answer = command(*arguments.split(), cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.startswith("megabridge: ") and message in answer.stderr
    assert "Traceback" not in answer.stderr and not answer.stdout
    assert "needs" in message or len(answer.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("--help | head -1", 0, ""),
        ("--cfg job <&- | head -1", 0, ""),
        ("--help <&- >&-", 0, ""),
        ("--help >/dev/full", 1, "megabridge: standard output can't be written any more (No space left on device)"),
        ("stepz=1 2>/dev/full", 2, ""),
        ("stepz=1 <&- >&- 2>&-", 2, ""),
    ],
)
def test_standard_streams_may_be_closed_full_or_read_by_nobody(tmp_path: Path, line: str, status: int, said: str) -> None:
    shell = ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m megabridge.run {line}"]
    answer = subprocess.run(shell, cwd=tmp_path, env=environ(), capture_output=True, text=True, timeout=60)
    assert answer.returncode == status and answer.stderr.startswith(said or "\n") == bool(said), answer.stderr
    assert "Traceback" not in answer.stderr and not list(tmp_path.iterdir())


def test_ranks_run_without_standard_streams(tmp_path: Path) -> None:
    """Their config, their outcome and their files get no number that a library takes for standard output."""
    run = [sys.executable, "-m", "megabridge.run", "model=tiny_llama", RECIPE, "run_dir=run", "+recipe.options.word=a"]
    answer = subprocess.run(["bash", "-c", 'exec "$@" <&- >&-', "", *run], cwd=tmp_path, env=environ(), stderr=subprocess.PIPE)
    assert answer.returncode == 0 and not answer.stderr and (tmp_path / "run" / "rank0").read_text() == "a"


def test_ctrl_c_while_it_is_imported_is_one_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(60)\n")
    answer = subprocess.run(
        [sys.executable, "-m", "megabridge.run", "--help"],
        cwd=tmp_path,
        env=environ(PYTHONPATH=f"{tmp_path}:{ROOT}"),
        capture_output=True,
        timeout=60,
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (130, b"", b"")


def test_the_version_is_ours(tmp_path: Path) -> None:
    for flags in (["--version"], ["--version", "seed=1"]):
        answer = command(*flags, cwd=tmp_path)
        assert (answer.returncode, answer.stdout) == (0, f"megabridge {VERSION}\n") and not answer.stderr


def test_settings_written_as_flags_are_explained(tmp_path: Path) -> None:
    answer = command("--learning_rate", "1e-4", cwd=tmp_path)
    assert answer.returncode == 2 and "settings are written key=value" in answer.stderr and "it is optimizer.lr" in answer.stderr


def test_a_working_directory_that_is_gone_is_said(tmp_path: Path) -> None:
    line = f'mkdir gone; cd gone; rmdir ../gone; exec "{sys.executable}" -m megabridge.run --help'
    answer = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environ(), capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2 and "Traceback" not in answer.stderr
    assert answer.stderr.endswith(
        "megabridge: the working directory must exist, but can't be found (No such file or directory); change to another.\n"
    )


def test_a_mistake_in_a_users_yaml_is_explained(tmp_path: Path) -> None:
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "own.yaml").write_text("stepps: 3\n")
    answer = command("--config-dir", "mine", "recipe=own", cwd=tmp_path)
    assert answer.returncode == 2 and "unknown key 'recipe.stepps'; did you mean 'recipe.steps'?" in answer.stderr


def test_a_run_and_a_sweep_leave_one_directory_each_and_no_secret(tmp_path: Path) -> None:
    """Two jobs; the objective reaches Hydra, secrets reach the ranks and no file."""
    secrets = {"SERVICE_TOKEN": "tok-123456789"}
    run = start(
        "-m",
        "seed=1,2",
        "++logger.wandb.api_key=hunter2secret",
        "++logger.wandb.entity=${oc.env:SERVICE_TOKEN}",
        "++recipe.options.word=${logger.wandb.entity}",
        cwd=tmp_path,
        **secrets,
    )
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    written = sorted(
        file for file in tmp_path.rglob("*") if file.is_file() and file.name not in ("rank0", ".run.lock", "console.log")
    )
    names = [str(file.relative_to(tmp_path).parent.name + "/" + file.name) for file in written]
    assert names == [
        "0/commands.txt",
        "0/config.yaml",
        "1/commands.txt",
        "1/config.yaml",
        f"{written[-1].parent.name}/multirun.yaml",
    ]
    for file in written:
        assert "hunter2secret" not in file.read_text() and "tok-123456789" not in file.read_text()
    assert "hunter2secret" not in out + err
    assert "++logger.wandb.api_key='<redacted>'" in shlex.split(written[0].read_text())
    config = yaml.safe_load(written[1].read_text())
    assert config["seed"] == 1 and config["run_dir"] == str(written[1].parent)
    assert config["logger"]["wandb"]["api_key"] == "<redacted>"
    assert config["logger"]["wandb"]["entity"] == "${oc.env:SERVICE_TOKEN}"
    assert config["recipe"]["options"]["word"] == "<redacted>"
    assert (written[0].parent / "rank0").read_text() == "tok-123456789"


def test_ranks_of_srun_share_rank_zeros_directory(tmp_path: Path) -> None:
    ranks = [
        start(
            "parallel=tp2",
            f"run_dir=run{rank}",
            cwd=tmp_path,
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
            SLURM_STEP_NUM_TASKS="2",
            SLURM_STEP_NODELIST="localhost",
            MASTER_PORT=str(port),
        )
        for port in [free_port()]
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    left = [".run.lock", "commands.txt", "config.yaml", "console.log", "rank0", "rank1", "run0"]
    assert sorted(file.name for file in tmp_path.rglob("*")) == left


def test_a_rank_of_torchrun_that_vanishes_counts_as_failed(tmp_path: Path) -> None:
    """Its own process stays beside it; that of the rank that waits for it hears of the lost connection."""
    port = free_port()
    ranks = [
        start(
            "parallel=dp2",
            "run_dir=run",
            cwd=tmp_path,
            recipe="vanish",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert errors[1].startswith("megabridge: rank 1: ended with exit status 0 and without a report before it was done;")
    assert errors[0].startswith("megabridge: rank 0: the connection to another rank was lost")


def test_ranks_with_different_configs_are_named_once(tmp_path: Path) -> None:
    port = free_port()
    ranks = [
        start(
            "parallel=dp2",
            f"seed={5 if rank == 1 else 4}",
            "run_dir=run",
            cwd=tmp_path,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert re.findall(r"the config of rank ([\d, ]+) differs", "".join(errors)) == ["1"]


def test_a_rank_of_a_wrong_world_is_refused_without_torch(tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    answer = command("model=tiny_llama", "parallel=tp2", RECIPE, cwd=tmp_path, env=place)
    assert answer.returncode == 2 and "must divide the number of processes, 3" in answer.stderr
    answer = command("-m", "seed=1,2", cwd=tmp_path, env=place)
    assert answer.returncode == 2 and "sweep without them" in answer.stderr
    assert not list(tmp_path.iterdir())


def test_a_wheel_works_from_an_empty_folder(tmp_path: Path) -> None:
    """Built from this tree, unpacked alone on the path: own conf, own callback, own recipe."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert "megabridge/conf/config.yaml" in names and "recipes/finetune.py" in names
    assert not any(name.startswith(("tests/", "conf/")) for name in names)
    (empty / "mine" / "callbacks").mkdir(parents=True)
    (empty / "mine" / "callbacks" / "own.yaml").write_text("own:\n  _target_: own.Loud\n  word: hello\n")
    (empty / "own.py").write_text(
        "from megabridge.config import instantiate\n"
        "from megabridge.callbacks import Callback\n"
        "class Loud(Callback):\n"
        "    def __init__(self, word: str) -> None:\n"
        "        print('LOUD', word, flush=True)\n"
        "def main(config):\n"
        "    instantiate.build(config.callbacks['own'], Callback, where='callbacks.own')\n"
    )
    arguments = ["--config-dir", "mine", "model=tiny_llama", "callbacks=[default,own]"]
    env = environ() | {"PYTHONPATH": str(site)}
    shown = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments, "--cfg", "job"],
        cwd=empty,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stderr
    assert list(yaml.safe_load(shown.stdout)["callbacks"])[-1] == "own"
    run = subprocess.run(
        [sys.executable, "-m", "megabridge.run", *arguments, "recipe.target=own:main", "run_dir=run"],
        cwd=empty,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0 and "LOUD hello" in run.stdout, run.stderr
