"""Recipes that do what a test of the launcher needs, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megabridge.config.schema import Config
from megabridge.errors import ConfigError


class Aloof(BaseException):
    """As torch's CheckpointException is."""


def objective(config: Config) -> float:
    """Leaves a file per rank; returns seed + world size, summed over the ranks by a collective."""
    total = torch.tensor([1.0])
    dist.all_reduce(total)
    Path(config.run_dir, f"rank{dist.get_rank()}").write_text(str(config.recipe.options.get("word")))
    return config.seed + float(total)


def fail_on_rank_one(config: Config) -> None:
    """Rank 1 raises; the others wait for it in a collective."""
    if dist.get_rank() == 1:
        raise ConfigError("the answer must be 42; use 42.")
    dist.barrier()


def crash_on_rank_one(config: Config) -> None:
    """Rank 1 is killed; the others wait for it in a collective."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def vanish(config: Config) -> None:
    """The last rank ends in the middle, as if all were well; others wait for it in a collective."""
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    dist.barrier()


def end_aloof(config: Config) -> None:
    """The last rank raises what passes every `except Exception`, with a text that no file takes; others wait."""
    if dist.get_rank() == dist.get_world_size() - 1:
        raise Aloof("extra\ud800.weight \x1b[2J" + "\x01" * 20_000)
    dist.barrier()


def wait(config: Config) -> None:
    """Starts a process that leaves its session, says that it waits, and waits."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(sleep, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    unfinished = Path(config.run_dir, f"unfinished{dist.get_rank()}")
    unfinished.write_text(f"{os.getpid()} {child.pid}")
    unfinished.rename(Path(config.run_dir, f"waits{dist.get_rank()}"))
    time.sleep(600)


def fail_under_tp(config: Config) -> float:
    """Rank 1 raises where there is tensor parallelism; else what `objective` does."""
    if config.parallel.tp > 1:
        fail_on_rank_one(config)
    return objective(config)
