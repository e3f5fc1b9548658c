"""The trainer: steps, validation, saves, resume, and the hooks around them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import megabridge.platform as platform
from megabridge.agreement import gather, on_rank_zero
from megabridge.checkpoint import folders, native
from megabridge.config import Config
from megabridge.errors import ConfigError
from megabridge.loggers import Logger, Reporter
from megabridge.training import resume
from megabridge.training.hooks import Callback
from megabridge.training.routers import RouterStatistics
from megabridge.training.step import Batch, TrainingError, forward_backward, prepare, validate
from megabridge.training.stopping import Stopped, StopSignal

from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

if TYPE_CHECKING:
    from megabridge.bridge import AutoBridge
    from megabridge.data import DataModule


class Trainer:
    """Trains `chunks` for `config.recipe.steps` optimizer steps. Every rank makes one and calls `fit`.

    `chunks` are DDP-wrapped and their config has calculate_per_token_loss; `optimizer` and `scheduler` come from
    `build_optimizer`; `data` has been set up. `bridge` is what the callbacks export with. Loggers are called on rank 0.
    """

    def __init__(
        self,
        config: Config,
        *,
        chunks: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
        data: DataModule,
        bridge: AutoBridge | None = None,
        callbacks: Sequence[Callback] = (),
        loggers: Sequence[Logger] = (),
    ) -> None:
        self.config = config
        self.chunks = list(chunks)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.data = data
        self.bridge = bridge
        self.callbacks = list(callbacks)
        self.report = Reporter(config, loggers)
        self.run_dir = Path(config.run_dir)
        self.checkpoints = Path(config.checkpoint.path) if config.checkpoint.path else self.run_dir / "checkpoints"
        self.step = 0
        self.consumed_samples = 0
        self.summary: list[str] = []
        """Lines that the console shows when the run ends; callbacks add to it."""
        self.exports: list[Path] = []
        """Hugging Face folders that callbacks published in this process, oldest first."""
        self.validation_losses: list[tuple[int, float]] = []
        """(step, loss) of every validation in this process."""
        self._saved_step: int | None = None
        self._lock: IO[str] | None = None
        self._micro_batches = _micro_batches(config)
        self._clock = _Clock()
        self._routers = RouterStatistics(self.chunks)
        prepare(self.chunks, optimizer)

    @property
    def is_main(self) -> bool:
        """Whether this rank logs and writes what only one rank writes."""
        return dist.get_rank() == 0

    def log(self, metrics: Mapping[str, float]) -> None:
        """Gives `metrics` to every logger, at the current step."""
        self.report.log(self.step, metrics)

    def say(self, line: str) -> None:
        """Gives a line for people to every logger."""
        self.report.say(line)

    def fit(self) -> float | None:
        """Trains, and returns the last validation loss (None without validation data).

        Raises TrainingError for a loss or gradient that is not a number, which is never saved, and Stopped (exit code 75)
        after the save that SIGTERM or SIGUSR1 asked for.
        """
        try:
            with StopSignal() as stop:
                return self._fit(stop)
        except Exception as error:
            self._call("on_error", error)
            raise
        finally:
            self.report.close()
            if self._lock is not None:
                self._lock.close()

    def _fit(self, stop: StopSignal) -> float | None:
        self._start()
        recipe, saving = self.config.recipe, self.config.checkpoint
        validation = self._validation_batches()
        if recipe.eval_at_start:
            self._validate(validation)
        stopped = self._train(validation, stop)
        if line := self.data.left_out():
            self.say(line)
        if self.step != self._last_validated() and not stopped:
            self._validate(validation)
        if (saving.save_at_end or stopped) and self._saved_step != self.step:
            self._save()
        if stopped:
            self.say(f"stopped by a signal after step {self.step}, saved; continue with checkpoint.resume=auto")
            raise Stopped(self.step)
        self._finish()
        return self.validation_losses[-1][1] if self.validation_losses else None

    def _start(self) -> None:
        self._lock = None
        on_rank_zero("claiming the checkpoint folder", self._claim)
        self._call("on_start")
        source = on_rank_zero("looking for a checkpoint", lambda: resume.source(self.config, self.checkpoints))
        if source is not None:
            self._resume(source)
        elif self.bridge is not None and self.bridge.import_report is not None:
            self._call("on_import", self.bridge.import_report)

    def _claim(self) -> None:
        self._lock = folders.lock(self.checkpoints)
        folders.remove_orphans(self.checkpoints)

    def _resume(self, source: Path) -> None:
        progress = native.load(source, self.chunks, optimizer=self.optimizer, scheduler=self.scheduler)
        if self.bridge is not None:
            self.bridge.remember(source / native.ASSETS)
        for line in resume.changes(progress.settings, resume.settings(self.config)):
            self.say(f"resumed with a changed setting, {line}")
        self.step, self.consumed_samples = progress.step, progress.consumed_samples
        self._saved_step = self.step if source.parent.parent.resolve() == self.checkpoints.resolve() else None
        self.say(f"resumed from {source} at step {self.step}")
        if not progress.same_layout:
            self.say("the layout has changed: dropout continues from new random states")
        self._call("on_resume", source)

    def _train(self, validation: list[Batch], stop: StopSignal) -> bool:
        """The steps that are left; returns whether a signal ended them early."""
        recipe, saving = self.config.recipe, self.config.checkpoint
        data = self.data.train_batches(
            self.consumed_samples,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
        )
        self._clock.start(self.step)
        while self.step < recipe.steps:
            self._call("before_step")
            metrics = self._one_step(data)
            self._call("after_step", metrics)
            ends = self.step == recipe.steps
            if self._checks_now() and self._is_stopping(stop):
                self._call("on_stop")
                return True
            if recipe.eval_every and self.step % recipe.eval_every == 0:
                self._validate(validation)
            if saving.save_every and self.step % saving.save_every == 0 and not (ends and not saving.save_at_end):
                self._save()
        return False

    def _one_step(self, data: Iterator[Batch]) -> dict[str, float]:
        """One optimizer step; returns its metrics where it is logged, else nothing."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        checked = self._checks_now(self.step + 1)
        self._routers.begin(is_logged=checked)
        totals = forward_backward(self.chunks, list(islice(data, self._micro_batches)), forward_only=False)
        if checked:
            self._refuse_non_finite("loss", float(totals[0]))
        updated, grad_norm, _ = self.optimizer.step()
        if grad_norm is not None and checked:
            self._refuse_non_finite("gradient norm", float(grad_norm))
        rate = get_canonical_lr_for_logging(self.optimizer.param_groups)
        if updated:
            self.scheduler.step(1)
        self.step += 1
        self.consumed_samples += self.config.recipe.global_batch_size
        if not checked:
            return {}
        total, count = totals.tolist()
        metrics = {
            "train/loss": total / max(count, 1.0),
            "train/learning_rate": float(rate or 0.0),
            "train/loss_tokens": count,
            "train/consumed_samples": float(self.consumed_samples),
            **self._clock.rates(self.step, self.config),
            **self._routers.metrics(self._micro_batches),
        }
        if grad_norm is not None:
            metrics["train/grad_norm"] = float(grad_norm)
        self.log(metrics)
        return metrics

    def _checks_now(self, step: int | None = None) -> bool:
        """Whether results of `step` are read on the host. Elsewhere nothing waits for the device."""
        step = self.step if step is None else step
        recipe, saving = self.config.recipe, self.config.checkpoint
        return step == recipe.steps or any(
            every and step % every == 0 for every in (recipe.log_every, recipe.eval_every, saving.save_every)
        )

    def _refuse_non_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the {what} of step {self.step + 1} is {value}; nothing of it is saved. Lower optimizer.lr, lengthen "
                "scheduler.warmup_steps, or look at the batch, and continue with checkpoint.resume=auto."
            )

    def _is_stopping(self, stop: StopSignal) -> bool:
        """Whether any rank has got a signal: all leave the loop at the same step."""
        flag = torch.tensor(int(stop.received), device=platform.device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _validation_batches(self) -> list[Batch]:
        return self.data.validation_batches(
            dp_rank=parallel_state.get_data_parallel_rank(), dp_size=parallel_state.get_data_parallel_world_size()
        )

    def _last_validated(self) -> int | None:
        return self.validation_losses[-1][0] if self.validation_losses else None

    def _validate(self, batches: list[Batch]) -> None:
        if not any(gather(bool(batches))):
            return
        self._call("before_validation")
        recipe = self.config.recipe
        started = time.perf_counter()
        loss, tokens = validate(self.chunks, batches, micro_batch_size=recipe.micro_batch_size, seq_length=recipe.seq_length)
        self._refuse_non_finite("validation loss", loss)
        self.validation_losses.append((self.step, loss))
        seconds = time.perf_counter() - started
        self._clock.skip(seconds)
        self.log({"validation/loss": loss, "validation/tokens": float(tokens), "validation/seconds": seconds})
        self._call("after_validation", loss)

    def _save(self) -> None:
        saving = self.config.checkpoint
        save_started = time.perf_counter()
        self._call("before_save", self.step)
        folder = folders.step_folder(self.checkpoints, self.step)
        if saving.native:
            started = time.perf_counter()
            native.save(
                folder / folders.NATIVE,
                self.chunks,
                progress=native.Progress(self.step, self.consumed_samples, resume.settings(self.config)),
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                write_assets=None if self.bridge is None else self.bridge.write_assets,
            )
            self.log({"checkpoint/seconds": time.perf_counter() - started})
        self._call("on_save", self.step, folder)
        self._saved_step = self.step
        if saving.keep_last:
            count = saving.keep_last
            on_rank_zero("removing old checkpoints", lambda: folders.keep_last(self.checkpoints, count))
        self._clock.skip(time.perf_counter() - save_started)

    def _finish(self) -> None:
        if self.validation_losses:
            first, last = self.validation_losses[0][1], self.validation_losses[-1][1]
            self.summary.insert(0, f"validation loss: {first:.4f} before, {last:.4f} after ({last / first - 1:+.1%})")
        self._call("on_end")
        for line in self.summary:
            self.say(line)

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)


class _Clock:
    """Seconds per step between two logged steps, without what validation and saves took in between."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, step: int) -> None:
        self._step, self._since = step, time.perf_counter()

    def skip(self, seconds: float) -> None:
        self._since += seconds

    def rates(self, step: int, config: Config) -> dict[str, float]:
        seconds = (time.perf_counter() - self._since) / max(step - self._step, 1)
        self.start(step)
        tokens = config.recipe.global_batch_size * config.recipe.seq_length
        return {"train/step_seconds": seconds, "train/tokens_per_second": tokens / seconds}


def _micro_batches(config: Config) -> int:
    """Micro-batches of one optimizer step on this data-parallel rank. Raises ConfigError where they don't come out even."""
    recipe = config.recipe
    dp: int = parallel_state.get_data_parallel_world_size()
    count, rest = divmod(recipe.global_batch_size, recipe.micro_batch_size * dp)
    if rest or not count:
        raise ConfigError(
            f"recipe.global_batch_size={recipe.global_batch_size} must be a multiple of recipe.micro_batch_size x dp = "
            f"{recipe.micro_batch_size} x {dp}; use {recipe.micro_batch_size * dp * max(count, 1)} or change either."
        )
    pp, vpp = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
    )
    if vpp is not None and count % pp:
        raise ConfigError(
            f"with parallel.vpp={vpp} the {count} micro-batches of a step must be a multiple of parallel.pp={pp}; use "
            f"recipe.global_batch_size={recipe.micro_batch_size * dp * pp * (count // pp + 1)}."
        )
    return count
