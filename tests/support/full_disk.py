"""Runs whose saves find no room, for a while, on one disk, or at all."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megabridge.errors import CheckpointError
from megabridge.native import checkpoint
from megabridge.storage import disk_room, folders
from megabridge.training import Callback, Trainer, saving
from tests.support import tiny
from tests.support.limits import largest_file


def sizes(run_dir: str) -> list[tuple[str, int, int]]:
    """(case, bytes foretold before the first step, bytes that the save of it has) of several kinds of optimizer and model."""
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "float32": ({}, {}),
        "bfloat16": ({}, {"dtype": "bfloat16"}),
        "whole state on every rank": ({}, {"distributed": False}),
        "whole bfloat16 state": ({}, {"distributed": False, "dtype": "bfloat16"}),
        "sgd": ({"optimizer": {"name": "sgd"}}, {"distributed": False}),
        "frozen": ({}, {"frozen": True}),
    }
    found, asked = [], list[int]()
    check = folders.check_space
    folders.check_space = lambda folder, needed: asked.append(needed) or check(folder, needed)  # type: ignore[func-returns-value]
    for number, (name, (settings, options)) in enumerate(cases.items()):
        frozen = options.pop("frozen", False)
        trainer = tiny.trainer(tiny.config(f"{run_dir}/{number}", steps=1, **settings), **options)
        if frozen:
            trainer = _frozen(trainer, f"{run_dir}/{number}")
        before = checkpoint.size(trainer.chunks, trainer.optimizer)
        asked.clear()
        trainer.fit()
        found.append((name, before, asked[0] if dist.get_rank() == 0 else before))
    folders.check_space = check
    return found


def _frozen(trainer: Trainer, run_dir: str) -> Trainer:
    """The trainer again, with the parameters of every other layer frozen."""
    from megabridge.models.provider import ModelProvider

    real = ModelProvider.provide_distributed_model

    def provided(self: Any, **more: Any) -> Any:
        def freeze(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
            for chunk in chunks:
                for name, parameter in chunk.named_parameters():
                    parameter.requires_grad_("layers.1." not in name and "layers.3." not in name)
            return chunks

        self.register_pre_wrap_hook(freeze)
        return real(self, **more)

    ModelProvider.provide_distributed_model = provided  # type: ignore[method-assign]
    try:
        return tiny.trainer(tiny.config(run_dir, steps=1))
    finally:
        ModelProvider.provide_distributed_model = real  # type: ignore[method-assign]


class Full(Callback):
    """No file may be large while the steps in `saves` are saved, until the run says that it waits."""

    def __init__(self, saves: tuple[int, ...]) -> None:
        self.saves, self.limit = saves, contextlib.ExitStack()

    def on_start(self, trainer: Trainer) -> None:
        say = trainer.say

        def heard(line: str) -> None:
            say(line)
            if "waits for room" in line:
                self.limit.close()

        trainer.say = heard  # type: ignore[method-assign]

    def before_save(self, trainer: Trainer, step: int) -> None:
        if step in self.saves:
            self.limit.enter_context(largest_file(2000))

    def before_step(self, trainer: Trainer) -> None:
        self.limit.close()
        gc.collect()  # what a failed save leaves can be collected


@contextlib.contextmanager
def _room(sizes: dict[str, int]) -> Iterator[None]:
    """Folders whose path has a part of `sizes` in it have so many free bytes."""
    real = disk_room.free_bytes
    disk_room.free_bytes = lambda folder: next((size for part, size in sizes.items() if part in folder.parts), real(folder))
    try:
        yield
    finally:
        disk_room.free_bytes = real


def run(run_dir: str, *, full: tuple[int, ...] = (), room: dict[str, int] | None = None, **settings: Any) -> dict[str, Any]:
    """What a run says, takes and leaves, whose disk is full in the saves of steps `full`, or has so much `room` by folder."""
    saving._TURN = 0.01
    recorder = tiny.Recorder()
    callbacks = [recorder, Full(full)]
    trainer = tiny.trainer(tiny.config(run_dir, **settings), callbacks=callbacks)
    failed = ""
    with _room(room or {}):
        try:
            trainer.fit()
        except CheckpointError as error:
            failed = str(error)
    saved = sorted(str(native.relative_to(Path(run_dir).parent)) for native in Path(run_dir).parent.rglob("native"))
    return {"said": recorder.said, "failed": failed, "step": trainer.step, "saved": saved, "losses": recorder.steps}
