"""recipe=plan with a number of devices: the table, the commands, plan.json, and a sweep's ranking."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from tests.support.rank_server import RankServer

BATCH = "recipe.seq_length=2048 recipe.global_batch_size=32"


def test_layouts_are_ranked_and_the_best_is_planned(ranks: RankServer, tmp_path: Path) -> None:
    command = (
        f"recipe=plan model=llama32_1b {BATCH} plan.gpus=16 plan.device=h100 plan.show=4 plan.traced=2 logger=local run_dir=run"
    )
    done = ranks.program(command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [re.sub(r"^\[ *[\d.]+ s\] ", "", line) for line in done.stdout.splitlines()]
    head = next(number for number, line in enumerate(lines) if line.split()[:2] == ["rank", "layout"])
    rows = [line.split() for line in lines[head + 1 : head + 5]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert [row[2].startswith("~") for row in rows] == [False, False, True, True], "two are traced"
    times = [float(row[3]) for row in rows]
    assert times == sorted(times)
    end = next(number for number, line in enumerate(lines) if line.startswith("step 0/0"))
    assert max(map(len, lines[:end])) <= 108, "with the time 120"
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["chosen"] == plan["layouts"][0]["layout"] == rows[0][1] and plan["world_size"] == 16
    assert plan["chosen"] in (plan["parallel"], f"{plan['parallel']}sp")
    assert plan["layouts"][0]["memory"]["total"] == max(sum(stage.values()) for stage in plan["memory"])
    assert plan["devices"]["name"] == "h100" and plan["devices"]["count"] == 16
    assert plan["import"]["total"] == 16 * plan["import"]["most_of_a_rank"] or plan["layouts"][0]["sizes"]["dp"] < 16
    assert plan["export"]["total"] == plan["bytes"]
    text = "\n".join(lines)
    commands = re.findall(r"^ +\d+  (torchrun (?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert len(commands) == 4
    words = shlex.split(commands[0].replace("\\\n", " "))
    assert words == shlex.split(plan["layouts"][0]["command"]) and words[1:3] == ["--nnodes=2", "--nproc-per-node=8"]
    assert {"model=llama32_1b", *BATCH.split()} < set(words) and not [
        word for word in words if word.startswith(("plan.", "recipe="))
    ]
    metrics = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert metrics["plan/step_seconds"] == plan["layouts"][0]["seconds"]["total"]


def test_what_cannot_be_planned_is_said_at_once(ranks: RankServer, tmp_path: Path) -> None:
    for line, said in {
        "model=llama31_405b plan.gpus=8 plan.device=h100": "none of ",
        "model=tiny_llama plan.gpus=7 plan.device=h100 recipe.global_batch_size=4": "allows no layout of 7 processes",
        "model=tiny_llama plan.gpus=4 plan.device=h100 parallel.dp=3": "is given",
    }.items():
        done = ranks.program(f"recipe=plan logger=local run_dir=run {line}", cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and "run directory" not in done.stdout, done.stderr


def test_a_sweep_ranks_models_and_numbers_of_devices(ranks: RankServer, tmp_path: Path) -> None:
    done = ranks.program(
        f"-m hydra/launcher=local recipe=plan model=llama32_1b,llama32_3b plan.gpus=4,8 {BATCH} plan.device=a100 plan.traced=0 "
        "logger=local hydra.sweep.dir=sweep",
        cwd=tmp_path,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.partition("rank  point")[2].splitlines()
    assert {"model", "plan.gpus", "layout", "step_seconds", "tokens_per_second", "mfu", "memory_gib"} < set(table[0].split())
    found = [line.split()[1:4] for line in table[1:5]]
    assert sorted(found) == [
        ["0", "llama32_1b", "4"],
        ["1", "llama32_1b", "8"],
        ["2", "llama32_3b", "4"],
        ["3", "llama32_3b", "8"],
    ]
    assert found[0][1:] == ["llama32_1b", "8"] and found[-1][1:] == ["llama32_3b", "4"], "the fastest step first"
