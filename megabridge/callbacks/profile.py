"""Traces some steps for chrome://tracing or Perfetto: conf/callbacks/profile.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, override

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import megabridge.platform as platform
from megabridge.errors import ConfigError
from megabridge.training.hooks import Callback

if TYPE_CHECKING:
    from megabridge.training.loop import Trainer

FOLDER: Final = "profile"


class Profile(Callback):
    """Traces the steps `first` to `first + steps - 1` on `ranks`, as profile/steps_A-B_rank_R.json in the run directory.

    A run that starts or ends within them traces those it takes. `shapes`, `memory` and `stack` are torch.profiler's record_shapes,
    profile_memory and with_stack.
    """

    def __init__(
        self,
        first: int = 10,
        steps: int = 2,
        ranks: Sequence[int] = (0,),
        shapes: bool = False,
        memory: bool = False,
        stack: bool = False,
    ) -> None:
        if first < 1 or steps < 1:
            raise ConfigError(f"callbacks.profile.first={first} and steps={steps} must be at least 1; steps count from 1.")
        self._wanted = range(first, first + steps)
        self._ranks = tuple(ranks)
        self._options: dict[str, Any] = {"record_shapes": shapes, "profile_memory": memory, "with_stack": stack}
        self._running: tuple[Any, int] | None = None

    @override
    def before_step(self, trainer: Trainer) -> None:
        number = trainer.step + 1
        if self._running is None and number in self._wanted and dist.get_rank() in self._ranks:
            activities = [ProfilerActivity.CPU] if platform.is_cpu() else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            tracer = profile(activities=activities, **self._options)
            tracer.start()
            self._running = (tracer, number)

    @override
    def after_step(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        if trainer.step >= min(self._wanted.stop - 1, trainer.config.recipe.steps):
            self._write(trainer)

    @override
    def on_stop(self, trainer: Trainer) -> None:
        self._write(trainer)

    @override
    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self._running is None:
            return
        tracer, first = self._running
        self._running = None
        tracer.stop()
        folder = trainer.run_dir / FOLDER
        file = folder / f"steps_{first}-{max(trainer.step, first)}_rank_{dist.get_rank()}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tracer.export_chrome_trace(str(file))
        except OSError as error:  # a missing trace must not end the run
            print(f"{file} can't be written ({error.strerror}); the run goes on without it", flush=True)
            return
        trainer.say(f"trace of steps {first} to {max(trainer.step, first)}: {file}")
