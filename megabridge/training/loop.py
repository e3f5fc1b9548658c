"""Trainer: the training loop with validation, saves, resume and callbacks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch.distributed as dist

from megabridge.config.schema import Config
from megabridge.hf.dtypes import described
from megabridge.loggers import Logger, Reporter
from megabridge.native import checkpoint
from megabridge.parallel.collectives import all_gather, on_rank_zero, raise_together
from megabridge.storage import folders, steps, stop_page
from megabridge.training import batches, optimizer_step, resume, saving
from megabridge.training.flags import SharedFlag
from megabridge.training.hooks import Callback
from megabridge.training.moe_metrics import MoEMetrics
from megabridge.training.parameter_gather import ParameterGather
from megabridge.training.policy import Action, Guard, TrainingError, refuse_nonfinite
from megabridge.training.step import Batch, forward_backward, prepare, validate
from megabridge.training.stopping import Stopped, StopSignal
from megabridge.training.throughput import Clock

from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.utils import get_model_config

if TYPE_CHECKING:
    import torch

    from megabridge.bridge.auto_bridge import AutoBridge
    from megabridge.data import DataModule


class Trainer:
    """Trains `chunks` for `config.recipe.steps` optimizer steps. Every rank makes one and calls `fit`.

    `chunks` are DDP-wrapped and their config has calculate_per_token_loss; `optimizer` and `scheduler` come from
    `build_optimizer`; `data` has been set up. Callbacks export with `bridge`. Loggers are called on rank 0.
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
        self.places = steps.places(self.run_dir, config.checkpoint.path, config.checkpoint.spare_path)
        """Where saves go: the first that has room counts."""
        self.checkpoints = self.places[0]
        self.step = 0
        self.consumed_samples = 0
        self.summary: list[str] = []
        """Lines that the console shows when the run ends; callbacks add to them."""
        self.exports: list[Path] = []
        """Hugging Face folders that callbacks published in this process, oldest first."""
        self.validation_losses: list[tuple[int, float]] = []
        """(step, loss) of every validation in this process."""
        self.guard = Guard(config.policy)
        """Checks losses and gradients before a step is taken."""
        self.settings: Mapping[str, Any] = {}
        """Settings and inputs that saves record for a resume (megabridge.training.resume); set when `fit` begins."""
        self.skipped_steps = 0
        """Number of steps in this process that changed nothing: skipped by policy, or with FP16 gradients that overflowed."""
        self._saved_step: int | None = None
        self._good: Path | None = None
        self._lock: IO[str] | None = None
        self._micro_batches = batches.micro_batches(config)
        self._clock = Clock(self.chunks)
        self._stop_flag = SharedFlag()
        self.stop = StopSignal()
        """Whether a signal has asked this rank to stop, while `fit` runs; long work in callbacks checks it."""
        self._moe_metrics = MoEMetrics(self.chunks)
        prepare(self.chunks, optimizer)
        self._parameter_gather = ParameterGather(self.chunks)

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that logs and writes shared files."""
        return dist.get_rank() == 0

    def log(self, metrics: Mapping[str, float]) -> None:
        """Passes `metrics` to every logger, at the current step."""
        self.report.log(self.step, metrics)

    def table(self, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Passes rows of texts to every logger, at the current step."""
        self.report.table(self.step, name, rows)

    def say(self, line: str) -> None:
        """Passes a line of text to every logger."""
        self.report.say(line)

    def fit(self) -> float | None:
        """Trains, and returns the last validation loss (None without validation data).

        Raises TrainingError for a loss or gradient that is not finite, which is never saved (`config.policy` can skip such steps),
        and Stopped (exit code 75) after the save that a signal asked for.
        """
        try:
            with self.stop as stop:
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
        validation = self._validation_batches()
        if self.config.recipe.eval_at_start:
            self._validate(validation)
        saving.check_room(self)
        stop_page.own().is_training = True
        stopped = self._train(validation, stop)
        self._parameter_gather.pause()
        if line := self.data.left_out():
            self.say(line)
        if self.step != self._last_validated() and not stopped:
            self._validate(validation)
        if (self.config.checkpoint.save_at_end or stopped) and self._saved_step != self.step:
            self._save(is_last=True)
        # A signal during the last save leaves out what is done after it.
        stopped = stopped or (self._saved_step == self.step and self._stop_flag.now(stop.received))
        stop_page.own().is_training = False
        if stopped:
            settings = self.config.checkpoint
            is_saved = "saved" if settings.native or settings.hf else "not saved (checkpoint.native=false, checkpoint.hf=false)"
            self.say(f"stopped by a signal after step {self.step}, {is_saved}")
            raise Stopped(self.step)
        self._finish()
        return self.validation_losses[-1][1] if self.validation_losses else None

    def _start(self) -> None:
        self._lock = None
        for line in on_rank_zero("claiming the checkpoint folder", self._claim):
            self.say(line)
        self._call("on_start")
        self.settings = resume.settings(self.config, self.bridge, self.data)
        source = on_rank_zero("looking for a checkpoint", self._source)
        if source is not None:
            self._resume(source)
        elif self.bridge is not None and self.bridge.import_report is not None:
            self._call("on_import", self.bridge.import_report)
        if self.bridge is not None:
            self._clock.measure(self.bridge.plan(self.chunks))

    def _claim(self) -> list[str]:
        """Locks the checkpoint folder for this run, on rank 0; returns lines about its contents."""
        self._lock = folders.lock(self.checkpoints)
        problems = steps.remove_orphans(self.checkpoints)
        return problems + [f"{line}; it is ignored" for line in steps.invalid(self.checkpoints).values()]

    def _source(self) -> Path | None:
        return steps.source(self.config.checkpoint.resume, self.config.recipe.steps, self.places)

    def _resume(self, source: Path) -> None:
        changed: list[str] = []
        accepted = self.config.checkpoint.accept_changes
        progress = checkpoint.load(
            source,
            self.chunks,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            agree=lambda found: changed.extend(resume.changes(found.settings, self.settings, accepted=accepted)),
        )
        if self.bridge is not None:
            self.bridge.adopt_checkpoint(self.chunks, source, progress.rounded)
        if progress.rounded:
            self.say(f"rounded, because this run's parameters can't hold what the checkpoint has: {described(progress.rounded)}")
        if changed:
            self.say("resumed with changed settings:\n  " + "\n  ".join(changed))
        self.step, self.consumed_samples = progress.step, progress.consumed_samples
        self.guard.resume(progress.recent_losses)
        self._good = source
        self._saved_step = self.step if source.parent.parent.resolve() == self.checkpoints.resolve() else None
        self.say(f"resumed from {source} at step {self.step}")
        if not progress.same_layout:
            self.say("the layout has changed: dropout continues from new random states")
        self._call("on_resume", source)
        if self._saved_step is not None:
            saving.prune(self, source.parent)

    def _train(self, validation: list[Batch], stop: StopSignal) -> bool:
        """Runs the remaining steps; returns whether a signal ended them early."""
        recipe = self.config.recipe
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
            is_stopping = self._stop_flag.now if self._reads(self.step) else self._stop_flag.soon
            # Validation and saves take long: a signal that came before or during them is obeyed before the next step.
            if is_stopping(stop.received) or (self._pause(validation) and self._stop_flag.now(stop.received)):
                self._call("on_stop")
                return True
        return False

    def _pause(self, validation: list[Batch]) -> bool:
        """Validates and saves if one is due, and returns whether it was."""
        recipe, settings = self.config.recipe, self.config.checkpoint
        saves = bool(settings.save_every) and self.step % (settings.save_every or 1) == 0
        saves = saves and self.step != self._saved_step and (self.step != recipe.steps or settings.save_at_end)
        validates = bool(recipe.eval_every) and self.step % (recipe.eval_every or 1) == 0
        validates = self.step != self._last_validated() and (validates or (saves and bool(settings.keep_best)))
        if validates:
            self._validate(validation)
        if saves:
            self._save()
        return validates or saves

    def _one_step(self, data: Iterator[Batch]) -> dict[str, float]:
        """Runs one optimizer step; returns its metrics if it is logged, else an empty dict."""
        self._parameter_gather.resume()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reads = self._reads(self.step + 1)
        self._moe_metrics.begin(is_logged=reads)
        taken = batches.take(data, self._micro_batches)
        self._clock.count(taken)
        totals = forward_backward(self.chunks, taken, forward_only=False)
        scale = optimizer_step.loss_scale(self.optimizer)
        norm = optimizer_step.gradient_norm(self.optimizer)
        action = self._judged(totals, norm, scale) if reads or self.guard.reads_every_step else "go"
        if action == "rollback":
            self._roll_back()
            return {}
        rate = get_canonical_lr_for_logging(self.optimizer.param_groups)
        if (
            norm is not None
            and action == "go"
            and optimizer_step.optimizer_step(self.optimizer, norm, clip=self.config.optimizer.clip_grad)
        ):
            self.scheduler.step(1)
        else:
            self.skipped_steps += 1
        self.step += 1
        self.consumed_samples += self.config.recipe.global_batch_size
        if not reads:
            return {}
        total, count = totals.tolist()
        metrics = {
            "train/loss": total / max(count, 1.0),
            "train/learning_rate": float(rate or 0.0),
            "train/loss_tokens": count,
            "train/consumed_samples": float(self.consumed_samples),
            **self._clock.rates(self.step),
            **self._moe_metrics.metrics(self._micro_batches),
        }
        if norm is not None:
            metrics["train/grad_norm"] = float(norm)
        if self.skipped_steps:
            metrics["train/skipped_steps"] = float(self.skipped_steps)
        if get_model_config(self.chunks[0]).fp16:
            metrics["train/loss_scale"] = float(optimizer_step.loss_scale(self.optimizer))
        self.log(metrics)
        return metrics

    def _reads(self, step: int) -> bool:
        """Whether results of `step` are read on the host; other steps don't wait for the device."""
        recipe, settings = self.config.recipe, self.config.checkpoint
        return step == recipe.steps or any(
            every and step % every == 0 for every in (recipe.log_every, recipe.eval_every, settings.save_every)
        )

    def _judged(self, totals: torch.Tensor, norm: torch.Tensor | None, scale: torch.Tensor) -> Action:
        """Returns the policy's decision on the current step; logs a line if it isn't taken."""
        total, count = totals.tolist()
        size = optimizer_step.norm_for_policy(norm, scale, least_scale=self.config.optimizer.min_loss_scale)
        action, fault = self.guard.judge(self.step + 1, total / max(count, 1.0), size)
        if action != "go":
            self.say(f"{fault}: " + ("the step is skipped" if action == "skip" else "back to the last saved step"))
        return action

    def _roll_back(self) -> None:
        """Continues from the last save, with the batches after the bad one. Raises TrainingError where there is none."""
        if self._good is None:
            raise TrainingError(
                "policy.nonfinite or policy.spike is rollback, but no step was saved yet; set checkpoint.save_every, or skip."
            )
        self._parameter_gather.pause(sync=False)
        progress = checkpoint.load(self._good, self.chunks, optimizer=self.optimizer, scheduler=self.scheduler)
        self.guard.resume(progress.recent_losses)
        self.step = progress.step
        self.consumed_samples += self.config.recipe.global_batch_size
        self._clock.start(self.step)

    def _validation_batches(self) -> list[Batch]:
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        with raise_together("taking the validation batches"):
            return self.data.validation_batches(dp_rank=rank, dp_size=size)

    def _last_validated(self) -> int | None:
        return self.validation_losses[-1][0] if self.validation_losses else None

    def _validate(self, batches: list[Batch]) -> None:
        if not any(all_gather(bool(batches))):
            return
        self._parameter_gather.pause()
        self._call("before_validation")
        recipe = self.config.recipe
        started = time.perf_counter()
        loss, tokens = validate(self.chunks, batches, micro_batch_size=recipe.micro_batch_size, seq_length=recipe.seq_length)
        refuse_nonfinite(self.step, "validation loss", loss)
        self.validation_losses.append((self.step, loss))
        seconds = time.perf_counter() - started
        self._clock.skip(seconds)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        self.log(
            {
                "validation/loss": loss,
                "validation/perplexity": perplexity,
                "validation/tokens": float(tokens),
                "validation/seconds": seconds,
            }
        )
        self._call("after_validation", loss)

    def _save(self, *, is_last: bool = False) -> None:
        started = time.perf_counter()
        self._parameter_gather.pause()
        self._call("before_save", self.step)
        folder = saving.write(self, is_last=is_last or self.step == self.config.recipe.steps)
        if folder is not None:
            self._saved_step = self.step
            if self.config.checkpoint.native:
                self._good = folder / folders.NATIVE
            saving.prune(self, folder)
        self._clock.skip(time.perf_counter() - started)

    def _finish(self) -> None:
        if len(self.validation_losses) > 1:
            first, last = self.validation_losses[0][1], self.validation_losses[-1][1]
            self.summary.insert(0, f"validation loss: {first:.4f} before, {last:.4f} after ({last / first - 1:+.1%})")
        self._call("on_end")
        for line in self.summary:
            self.say(line)

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)
