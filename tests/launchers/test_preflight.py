"""What can't work is told at once, by a process that can't import torch, and leaves nothing."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megabridge.errors import ConfigError
from megabridge.launchers import run_lock
from tests.support.command import command
from tests.support.rank_server import RankServer

TINY = "model=tiny_llama data=random_tokens"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("model=auto model.path=./nowhere", "'./nowhere' must be an existing folder, or a hub id such as org/name"),
        ("model=auto model.path=there", "there must hold a config.json to be a Hugging Face model; it holds text.txt."),
        ("recipe=convert model=auto model.path=/not/at/all", "'/not/at/all' must be an existing folder, or a hub id"),
        ("model=tiny_llama data=chat data.path=chats.jsonl", "data.path: chats.jsonl names no file; check the path."),
        (
            "model=tiny_llama data=chat data.path=there/text.txt data.validation_path=/x.jsonl",
            "data.validation_path: /x.jsonl names no file",
        ),
        ("model=tiny_llama data=indexed data.paths=[there/text]", "text.bin does not exist; make it with recipe=prepare_data"),
        (f"{TINY} backend=te", "backend=te needs the package transformer_engine, which is not installed; pip install"),
        (f"{TINY} checkpoint.resume=there", "checkpoint.resume=there must be none, auto or the folder of a saved step"),
        (f"{TINY} peft=lora peft.path=adapters", "peft.path=adapters must be a folder with adapters; check the path."),
        ("recipe=report", "this recipe needs the directory of a sweep; give sweep=multirun/DATE/TIME."),
        ("recipe=collect sweep=there", "there must be the directory of a sweep"),
        (f"{TINY} recipe.steps=1 scheduler.warmup_steps=1", "scheduler.warmup_steps=1 must be less than the 1 steps over which"),
        (f"{TINY} scheduler=wsd scheduler.decay_steps=99", "scheduler.decay_steps=99 must be at most recipe.steps=8"),
        (f"{TINY} optimizer.lr=1e-6 scheduler.min_lr=1e-5", "scheduler.min_lr=1e-05 must be at most optimizer.lr=1e-06"),
    ],
)
def test_what_is_not_there_is_told_before_a_rank_starts(tmp_path: Path, arguments: str, said: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/text.txt").write_text("a")
    answer = command(*arguments.split(), cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert answer.returncode == 2 and said in answer.stderr, answer.stderr
    assert answer.stderr.startswith("megabridge: ") and "Traceback" not in answer.stderr and not answer.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"], "a refused command leaves no directory"


def test_everything_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    arguments = "model=auto model.path=./no data=chat data.path=no.jsonl checkpoint.resume=nothing run_dir=a/b".split()
    answer = command(*arguments, cwd=tmp_path)
    lines = answer.stderr.strip().splitlines()
    assert answer.returncode == 2 and len(lines) == 3 and not list(tmp_path.iterdir()), answer.stderr


def test_a_directory_in_use_is_told_at_once_and_those_that_were_there_stay(tmp_path: Path) -> None:
    run, empty = tmp_path / "run", tmp_path / "mine"
    empty.mkdir()
    with run_lock.claimed(run):
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"is in use by another run \(process "):
            run_lock.check(run)
        assert time.monotonic() - began < run_lock._LEAVING, "it doesn't wait for a process that lives"
        answer = command(*TINY.split(), f"run_dir={run}", cwd=tmp_path)
        assert answer.returncode == 2 and "is in use by another run (process " in answer.stderr
    answer = command(*TINY.split(), f"run_dir={empty}", "checkpoint.resume=nothing", cwd=tmp_path)
    assert answer.returncode == 2 and empty.is_dir() and not list(empty.iterdir())


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if "known" in self.path.rpartition("/")[2].split("-") else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_name_that_the_hub_does_not_know_is_told_at_once(tmp_path: Path, hub: str) -> None:
    where = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    arguments = "model=auto model.path=org/name data=chat data.path=org/rows".split()
    answer = command(*arguments, cwd=tmp_path, env=where)
    assert answer.returncode == 2
    assert "model.path=org/name is neither a local folder nor a model on the hub; check the spelling" in answer.stderr
    assert "data.path=org/rows is neither a local file or folder nor a data set on the hub" in answer.stderr
    answer = command(*arguments[:-1], "data.path='my rows ü'", cwd=tmp_path, env=where)
    assert (
        answer.returncode == 2
        and "data.path=my rows ü is neither a local file or folder nor a data set on the hub" in answer.stderr
    )
    known = "model=auto model.path=org/known data=chat data.path=org/rows-known checkpoint.resume=no".split()
    answer = command(*known, cwd=tmp_path, env=where)
    assert len(answer.stderr.strip().splitlines()) == 1 and "checkpoint.resume=no must be" in answer.stderr


def test_the_start_is_told_line_by_line(ranks: RankServer, tmp_path: Path) -> None:
    done = ranks.program(
        ["experiment=tiny_smoke", "recipe.steps=2", "parallel=dp2", "callbacks=none", "checkpoint=none", "run_dir=run"],
        cwd=tmp_path,
    )
    lines = [line.partition(" s] ")[2] for line in done.stdout.splitlines() if " s] " in line]  # beside those of libraries
    assert done.returncode == 0, done.stderr
    assert lines[:3] == ["starting 2 ranks on this host's CPU", "imports done", "2 ranks connected"]
    assert lines[3] == f"run directory {tmp_path / 'run'}"
