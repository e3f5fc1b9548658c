"""Commands that start a run on one host or on several. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from math import ceil
from typing import Final

RUN: Final = "python -m megabridge.run"


def start(world: int, arguments: Sequence[str], *, per_host: int) -> str:
    """Returns the command with `arguments` for `world` processes; on each host where `per_host` are too few for all."""
    said = shlex.join(arguments)
    if world <= per_host:
        return f"{RUN} {said}".rstrip()
    hosts, each = spread(world, per_host=per_host)
    rendezvous = "--rdzv-backend=c10d --rdzv-endpoint=FIRST_HOST:29500"
    return f"torchrun --nnodes={hosts} --nproc-per-node={each} {rendezvous} -m megabridge.run {said}".rstrip()


def spread(world: int, *, per_host: int) -> tuple[int, int]:
    """Returns (hosts, processes of each): the fewest hosts that take equally many."""
    hosts = ceil(world / per_host)
    while world % hosts:
        hosts += 1
    return hosts, world // hosts


def wrapped(command: str, *, width: int) -> list[str]:
    """Returns the command in lines of at most `width`, where words allow it, which a shell reads as one."""
    lines, line = [], ""
    for word in command.split(" "):
        if line and len(line) + len(word) + 3 > width:
            lines.append(f"{line} \\")
            line = f"    {word}"
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]
