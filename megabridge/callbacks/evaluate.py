"""Evaluates the Hugging Face folder of a save while every rank waits: conf/callbacks/evaluate.yaml."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, override

import torch

import megabridge.platform as platform
from megabridge import evaluation
from megabridge.callbacks.hf_export import FOLDER, HFExport
from megabridge.errors import CheckpointError, ConfigError, listed
from megabridge.evaluation.process import EvaluationError, Process
from megabridge.hf import assets
from megabridge.parallel.collectives import on_rank_zero
from megabridge.training.hooks import Callback

if TYPE_CHECKING:
    from megabridge.training.loop import Trainer

ON_ERROR: Final = ("warn", "fail")
_WAIT: Final = 5.0
"""Longest time in seconds between two collectives: an evaluation may take longer than a collective is allowed to."""


class Evaluate(Callback):
    """Runs `tasks` on checkpoints/step_N/hf, logs `evaluation/TASK/METRIC` and writes all results to step_N/evaluation.json.

    Evaluates every `every`-th save during the run (null: none) and, with `at_end`, the save of the last step. A resumed run
    evaluates the save that it continues from, if that wasn't done. `device` auto is that of the run: on CUDA, rank 0's. An
    evaluation that takes more than `timeout` seconds (null: no limit) fails. After a failure, on_error=warn reports it and goes on
    training, on_error=fail ends the run.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any] | None,
        every: int | None = 1,
        at_end: bool = True,
        batch_size: int = 4,
        device: str = "auto",
        on_error: str = "warn",
        timeout: float | None = 7200.0,
    ) -> None:
        self.specs = tasks
        self.every, self.at_end = every, at_end
        self.batch_size, self.device = batch_size, device
        self.policy, self.timeout = on_error, timeout  # `on_error` is a hook
        self.tasks: dict[str, evaluation.Task] = {}
        self._is_stopping = False

    @override
    def on_start(self, trainer: Trainer) -> None:
        self.tasks, problems = on_rank_zero("checking what is to be evaluated", lambda: self._checked(trainer))
        names = [problem for problem in self._look_up_names(trainer) if problem not in problems]
        if problems or names:
            raise ConfigError("callbacks.evaluate can't run with these settings:\n  " + listed(problems + names))

    @override
    def on_resume(self, trainer: Trainer, folder: Path) -> None:
        step = folder.parent
        is_ours = step.parent.resolve() == trainer.checkpoints.resolve()
        if is_ours and self._is_chosen(trainer, trainer.step) and not on_rank_zero("reading", lambda: self._is_done(step)):
            self._evaluate(trainer, step)

    @override
    def on_save(self, trainer: Trainer, step: int, folder: Path) -> None:
        if self._is_stopping:
            trainer.say(f"step {step} is not evaluated: the run is stopping")
        elif self._is_chosen(trainer, step):
            self._evaluate(trainer, folder)

    @override
    def on_stop(self, trainer: Trainer) -> None:
        self._is_stopping = True

    def _is_chosen(self, trainer: Trainer, step: int) -> bool:
        """Whether the save of `step` is evaluated; depends on the step alone, so that a resumed run chooses the same."""
        saving, last = trainer.config.checkpoint, trainer.config.recipe.steps
        if step == last and self.at_end:
            return True
        stride = (saving.save_every or 0) * (self.every or 0)
        return bool(stride) and step % stride == 0

    def _is_done(self, step: Path) -> bool:
        """Whether the step was evaluated with these tasks, or has no Hugging Face folder. On rank 0."""
        if not (step / FOLDER).is_dir():
            return True
        file = step / evaluation.FILE
        try:
            return file.is_file() and assets.read_object(file, otherwise="").get("tasks") == evaluation.specs(self.tasks)
        except CheckpointError:  # a file that can't be read is written again
            return False

    def _evaluate(self, trainer: Trainer, step: Path) -> None:
        """Evaluates a step in another process. Every rank calls it. Raises EvaluationError where on_error is fail."""
        started = time.monotonic()
        running: list[Process] = []

        def begin() -> str | None:
            if self._device().startswith("cuda"):
                torch.cuda.empty_cache()  # leaves unused memory to the other process
            try:
                running.append(Process(step / FOLDER, self.tasks, batch_size=self.batch_size, device=self._device()))
            except EvaluationError as error:
                return str(error)
            return None

        failure = on_rank_zero("starting an evaluation", begin)
        outcome: tuple[evaluation.Results | None, str | None] | None = (None, failure) if failure else None
        seconds = _wait_seconds(trainer)
        while outcome is None:
            outcome = on_rank_zero("evaluating", lambda: self._wait(trainer, running[0], seconds, time.monotonic() - started))
        results, failure = outcome
        if results is not None:
            self._report(trainer, step, results, time.monotonic() - started)
        if failure is not None:
            failure = f"{step / FOLDER} was not evaluated: {failure}"
            if self.policy == "fail":
                raise EvaluationError(
                    f"{failure}\nEverything was saved; correct the cause and continue with checkpoint.resume=auto, or set "
                    "callbacks.evaluate.on_error=warn."
                )
            trainer.say(failure)

    def _wait(
        self, trainer: Trainer, process: Process, seconds: float, spent: float
    ) -> tuple[evaluation.Results | None, str | None] | None:
        """Waits up to `seconds`, on rank 0. Returns None while the evaluation runs, then (results, error message).

        Both are None for an evaluation that was ended because the run is stopping.
        """
        if not process.wait(seconds):
            if trainer.stop.received:
                process.end()
                trainer.say("the evaluation was ended because the run is stopping; a resumed run repeats it")
                return None, None
            if self.timeout is not None and spent > self.timeout:
                process.end()
                return None, f"it took more than callbacks.evaluate.timeout={self.timeout:g} seconds"
            return None
        try:
            return process.results(), None
        except EvaluationError as error:
            return None, str(error)

    def _report(self, trainer: Trainer, step: Path, results: evaluation.Results, seconds: float) -> None:
        if problem := on_rank_zero("writing an evaluation", lambda: self._write(step, results)):
            trainer.say(problem)
        figures = {f"evaluation/{name}": value for name, value in results.metrics.items()}
        trainer.log(figures | {"evaluation/seconds": seconds})
        if results.generations:
            trainer.table(evaluation.TABLE, results.generations)
        trainer.say(f"evaluation of step {trainer.step}: {results.line()}")

    def _write(self, step: Path, results: evaluation.Results) -> str:
        """Writes the results beside the export. Returns an error message where that fails, which doesn't end the run."""
        file = step / evaluation.FILE
        try:
            evaluation.write(file, step / FOLDER, self.tasks, results)
        except OSError as error:
            return f"{file} can't be written ({error.strerror}); its figures are in the metrics, and a resumed run evaluates again"
        return ""

    def _device(self) -> str:
        """Returns the device on which the other process computes. On rank 0."""
        if self.device != "auto":
            return self.device
        return "cpu" if platform.is_cpu() else f"cuda:{torch.cuda.current_device()}"

    def _checked(self, trainer: Trainer) -> tuple[dict[str, evaluation.Task], list[str]]:
        """Returns the tasks, and a line for each problem; names of lm-evaluation-harness are checked in `_look_up_names`."""
        where, config = "callbacks.evaluate", trainer.config
        tasks, problems = evaluation.parsed(self.specs, where=f"{where}.tasks", seq_length=config.recipe.seq_length)
        if self.policy not in ON_ERROR:
            problems.append(f"{where}.on_error={self.policy!r} is not one of {', '.join(ON_ERROR)}")
        sizes = {"every": self.every, "batch_size": self.batch_size, "timeout": self.timeout}
        problems += [f"{where}.{key}={value} must be at least 1" for key, value in sizes.items() if value is not None and value < 1]
        try:
            evaluation.device_name(self.device)
        except ConfigError as error:
            problems.append(f"{where}: {error}")
        peft, saving = config.peft, config.checkpoint
        if peft.name != "none" and not peft.merge:
            problems.append(
                f"{where} evaluates a whole model, but with peft={peft.name} a save has only the adapters; set peft.merge=true"
            )
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        if not saving.hf or not any(isinstance(callback, HFExport) for callback in before):
            problems.append(f"{where} evaluates the export of hf_export; set checkpoint.hf=true and put hf_export before it")
        on_the_way = bool(self.every and saving.save_every and self.every * saving.save_every <= config.recipe.steps)
        if not on_the_way and not (self.at_end and saving.save_at_end):
            problems.append(f"{where} would evaluate no save of this run; set checkpoint.save_every, or at_end=true")
        if trainer.bridge is not None and trainer.bridge.source.folder is not None:
            problems += [f"{where}: {problem}" for problem in evaluation.problems(trainer.bridge.source.folder, tasks)]
        return tasks, problems

    def _look_up_names(self, trainer: Trainer) -> list[str]:
        """Returns a line for each name that lm-evaluation-harness doesn't know. Every rank calls it."""
        if not evaluation.asks_harness(self.tasks):
            return []
        checks: list[Process] = []
        on_rank_zero("starting a check", lambda: checks.append(Process(trainer.run_dir, self.tasks, check=True)))
        seconds = _wait_seconds(trainer)
        while not on_rank_zero("looking up tasks of lm-evaluation-harness", lambda: checks[0].wait(seconds)):
            pass
        return on_rank_zero("looking up tasks of lm-evaluation-harness", lambda: checks[0].problems())


def _wait_seconds(trainer: Trainer) -> float:
    """Returns the time in seconds between two collectives while ranks wait for rank 0."""
    return min(_WAIT, trainer.config.timeout / 4)
