"""Every early end is followed by the last save and the command that goes on from it; that command does."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megabridge.launchers import resuming
from megabridge.storage.stop_page import StopPage
from tests.support.command import ROOT, environ
from tests.support.rank_server import RankServer

RUN = ["experiment=tiny_smoke", "callbacks.answer=null", "callbacks.hf_export.logits_tokens=0", "recipe.eval_at_start=false"]
KILLED = ["+callbacks.killed={_target_: tests.support.recipes.Killed, step: 4}", "checkpoint.save_every=2", "checkpoint.hf=false"]


def steps(folder: Path) -> list[int]:
    """The steps that were logged."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [line["step"] for line in lines if "train/loss" in line]


def command_in(said: str) -> list[str]:
    """The arguments of the command that a message ends with."""
    words = shlex.split(said.strip().splitlines()[-1])
    assert words[words.index("megabridge.run") - 1] == "-m" if "megabridge.run" in words else words[0].endswith("megabridge")
    return words[words.index("megabridge.run") + 1 :] if "megabridge.run" in words else words[1:]


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megabridge.run", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_first_ctrl_c_saves_and_the_command_that_it_says_goes_on(ranks: RankServer, tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    arguments = [*RUN, "parallel=dp2", "recipe.steps=100000", f"run_dir={run_dir}"]
    run = start(arguments, tmp_path)
    until = time.monotonic() + 180
    while len(steps(run_dir)) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 75, err
    done = steps(run_dir)[-1]
    folder = run_dir / f"checkpoints/step_{done}"
    assert (folder / "native/metadata.json").is_file() and (folder / "hf/config.json").is_file()
    assert f"stopped by a signal after step {done}, saved" in out
    assert f"megabridge: the last save is step {done} of 100000, in {folder}; continue with:" in err
    words = command_in(err)
    assert words == [*arguments[:-1], f"run_dir={run_dir}", "checkpoint.resume=auto"]
    again = ranks.program([*words, f"recipe.steps={done + 2}"], cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert steps(run_dir)[-2:] == [done + 1, done + 2]


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    """In a step that would take minutes; before that there is no save to go on from."""
    arguments = [*RUN, "recipe.steps=9", "+callbacks.slow._target_=tests.support.recipes.Slow", f"run_dir={tmp_path}/run"]
    run = start(arguments, tmp_path)
    until = time.monotonic() + 180
    while not (tmp_path / "run/slow").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert run.stderr is not None
    os.kill(run.pid, signal.SIGTERM)
    assert run.stderr.readline() == "megabridge: stopping: the step in hand ends and is saved; once more ends at once.\n"
    began = time.monotonic()
    os.kill(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and time.monotonic() - began < 10
    assert err.startswith("megabridge: no step is saved; begin again with:\n") and command_in(err)[-1] == "checkpoint.resume=auto"


def test_a_killed_rank_is_followed_by_what_to_do(ranks: RankServer, tmp_path: Path) -> None:
    done = ranks.program([*RUN, *KILLED, "run_dir=run"], cwd=tmp_path, environ={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 128 + signal.SIGKILL
    assert re.match(
        r"megabridge: rank 0: was ended by SIGKILL \(out of memory, or killed from outside\)\.\n"
        rf"the last save is step 4 of 4, in {tmp_path}/run/checkpoints/step_4; continue with:\n  ",
        done.stderr,
    )
    words = command_in(done.stderr)
    assert words == [*RUN, *KILLED, f"run_dir={tmp_path}/run", "checkpoint.resume=auto"]


def test_a_rank_of_torchrun_says_it_beside_it(ranks: RankServer, tmp_path: Path) -> None:
    here = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "PYTHONPATH": str(ROOT)}
    done = ranks.program([*RUN, *KILLED, "run_dir=run"], cwd=tmp_path, environ=here)
    assert done.returncode == 128 + signal.SIGKILL and done.stderr.count("the last save is step 4 of 4") == 1
    assert done.stderr.strip().splitlines()[-1].startswith("  torchrun ... -m megabridge.run experiment=tiny_smoke ")


def test_a_run_that_is_done_says_where_all_is_and_what_may_come_next(ranks: RankServer, tmp_path: Path) -> None:
    """Every line once, and every command runs."""
    done = ranks.program([*RUN, "recipe.steps=2", "run_dir=run"], cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    said = [line for line in done.stdout.splitlines() if re.match(r"\[ *[\d.]+ s\] ", line)]  # the fork's libraries log, too
    lines = [line.partition(" s] ")[2] for line in said]
    assert len(set(lines)) == len(lines), "nothing is said twice"
    end = lines[lines.index(f"done; in {tmp_path}/run:") + 1 :]
    assert end[:4] == [
        "  Hugging Face folder: checkpoints/step_2/hf",
        "  native checkpoint: checkpoints/step_2/native",
        "  metrics: metrics.jsonl",
        "  console: console.log",
    ]
    commands = dict(line.strip().split(": ", 1) for line in end[5:])
    assert list(commands) == ["train on", "compare with transformers", "evaluate", "push to the hub"]
    ast.parse(shlex.split(commands.pop("push to the hub"))[2])
    for command in commands.values():
        again = ranks.program([*shlex.split(command)[1:], "logger=local"], cwd=tmp_path)
        assert again.returncode == 0, (command, again.stderr)
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    started = (tmp_path / "run/commands.txt").read_text().splitlines()
    assert len(started) == 2 and started[0].endswith(f"recipe.steps=2 run_dir={tmp_path}/run")
    kept = (tmp_path / "run/console.log").read_text()
    assert kept.count("starting 1 rank on this host's CPU") == 2 and all(line in kept for line in said)


def values(run_dir: Path, **checkpoint: Any) -> dict[str, Any]:
    saving = {"path": None, "spare_path": None, "native": True, "resume": "none", **checkpoint}
    return {"run_dir": str(run_dir), "checkpoint": saving, "recipe": {"target": "recipes.finetune:main", "steps": 9}}


def test_the_command_is_the_one_that_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["megabridge", "-cd", "my conf", "seed=1"])
    typed = [
        "hydra.run.dir=x",
        "hydra/launcher=local",
        "run_dir=old",
        "++checkpoint.resume=none",
        "seed=1",
        "logger.wandb.api_key=${oc.env:MEGABRIDGE_SECRET_LOGGER_WANDB_API_KEY}",
        "data.path='a b'",
    ]
    folder = tmp_path / "it's a (run)"
    said = resuming.command(values(folder), typed, is_auto=True)
    words = shlex.split(said)
    assert words[0].endswith("megabridge") and words[1:3] == ["--config-dir", "my conf"]
    assert words[3:] == [
        "seed=1",
        "logger.wandb.api_key='<redacted>'",
        "data.path='a b'",
        "run_dir='" + str(folder).replace("'", "\\'") + "'",
        "checkpoint.resume=auto",
    ]


def test_what_is_said_depends_on_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["megabridge"])
    page = StopPage()
    assert "no step is saved; begin again with:" in resuming.hint(values(tmp_path), [], page)
    other = values(tmp_path) | {"recipe": {"target": "recipes.plan:main", "steps": 0}}
    assert resuming.hint(other, [], page) == ""
    page.is_training = True
    page.is_training = False
    assert "checkpoint.native=false" in resuming.hint(values(tmp_path, native=False), [], page)
    begun = resuming.hint(values(tmp_path, resume="/a/step_3"), ["checkpoint.resume=/a/step_3"], page)
    assert begun.endswith(f"checkpoint.resume=/a/step_3 run_dir={tmp_path}")
    spare = values(tmp_path, spare_path=str(tmp_path / "spare"))
    home, away = resuming.steps.places(tmp_path, None, str(tmp_path / "spare"))
    for place, step in ((home, 2), (away, 3)):
        (place / f"step_{step}/native").mkdir(parents=True)
        for name in ("metadata.json", ".metadata"):
            (place / f"step_{step}/native/{name}").touch()
    assert resuming.hint(spare, [], page).startswith(f"the last save is step 3 of 9, in {away}/step_3; continue with:")
