"""What the ranks of tests/training/test_policy.py and test_update.py run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megabridge.config.schema import PolicyConfig
from megabridge.training import Callback, Trainer
from megabridge.training.flags import SharedFlag
from megabridge.training.policy import Guard, TrainingError, refuse_nonfinite_parameters
from megabridge.training.step import forward_backward, prepare
from tests.support import tiny
from tests.support.training import parameters

NAN = float("nan")


class Bad(tiny.Samples):
    """Samples whose step number `at` (from 1) is bad: its losses are multiplied by `factor`, or its gradients become NaN."""

    def __init__(self, trainer: Trainer, *, at: int, factor: float = 1.0, gradient: bool = False, without: bool = False) -> None:
        super().__init__(trainer.config.recipe.micro_batch_size)
        self.size = trainer.config.recipe.global_batch_size
        self.bad = range((at - 1) * self.size, at * self.size)
        self.factor, self.gradient, self.without = factor, gradient, without
        self.is_bad = False
        trainer.chunks[-1].register_forward_hook(self._spoil)

    def _spoil(self, module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not self.is_bad or not module.training:
            return None
        if self.gradient:
            output.register_hook(lambda gradient: gradient * NAN)
            return None
        return output * self.factor

    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[dict[str, torch.Tensor]]:
        step = self.micro_batch_size * dp_size
        start = consumed_samples
        while True:
            if not (self.without and start in self.bad):
                self.is_bad = start in self.bad and not self.without
                self.seen.append(start)
                first = start + dp_rank * self.micro_batch_size
                yield tiny.batch(range(first, first + self.micro_batch_size))
            start += step


class Prints(Callback):
    """A number for the parameters after each step, and the trainer's step then."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self.steps: list[int] = []

    def after_step(self, trainer: Trainer, metrics: Any) -> None:
        self.sums.append(float(sum(p.double().abs().sum() for p in trainer.chunks[0].parameters())))
        self.steps.append(trainer.step)


def bad_step(run_dir: str, *, policy: dict[str, Any], at: int = 3, steps: int = 6, **bad: Any) -> dict[str, Any]:
    """A run of six steps, saved at every second, whose third has a bad batch."""
    recorder, prints = tiny.Recorder(), Prints()
    trainer = tiny.trainer(tiny.config(run_dir, steps=steps, save_every=2, policy=policy), callbacks=[recorder, prints])
    data: Any = Bad(trainer, at=at, **bad)
    trainer.data = data
    error = ""
    try:
        trainer.fit()
    except TrainingError as failure:
        error = str(failure)
    return {
        "error": error,
        "steps": prints.steps,
        "sums": prints.sums,
        "batches": data.seen,
        "losses": [step.get("train/loss") for step in recorder.steps],
        "last": recorder.steps[-1] if recorder.steps else {},
        "said": recorder.said,
        "consumed": trainer.consumed_samples,
        "parameters": parameters(trainer.chunks),
        "saved": sorted(entry.name for entry in Path(run_dir, "checkpoints").glob("step_*")),
    }


def policies(run_dir: str) -> dict[str, dict[str, Any]]:
    """`bad_step` under each policy."""
    spike = {"spike_window": 2, "spike_factor": 3.0}
    rollback = {"nonfinite": "rollback"}
    cases: dict[str, dict[str, Any]] = {
        "skip": {"policy": {"nonfinite": "skip"}, "factor": NAN},
        "skip_gradient": {"policy": {"nonfinite": "skip"}, "gradient": True},
        "rollback": {"policy": rollback, "factor": NAN},
        "without": {"policy": {}, "without": True},
        "stop_spike": {"policy": {"spike": "stop", **spike}, "factor": 100.0},
        "skip_spike": {"policy": {"spike": "skip", **spike}, "factor": 100.0},
        "ignore_spike": {"policy": {}, "factor": 100.0},
        "nothing_saved": {"policy": rollback, "factor": NAN, "at": 1},
        "limit": {"policy": {"nonfinite": "skip", "limit": 0}, "factor": NAN},
    }
    return {name: bad_step(f"{run_dir}/{name}", **kwargs) for name, kwargs in cases.items()}


def judged() -> list[Any]:
    """What a guard says to a row of losses, with a window of 3 and a factor of 2."""
    guard = Guard(PolicyConfig(nonfinite="skip", spike="rollback", spike_window=3, spike_factor=2.0, limit=3))
    losses = [1.0, 9.0, 2.0, 8.1, 8.0, math.inf, 3.0]
    actions: list[Any] = [guard.judge(step, loss, 1.0)[0] for step, loss in enumerate(losses, 1)]
    actions.append(guard.judge(8, 1.0, NAN)[0])
    try:
        guard.judge(9, NAN, 1.0)
    except TrainingError as error:
        actions.append(str(error))
    return [*actions, list(guard.recent)]


def parameter_that_is_not_finite() -> str:
    """The error on every rank, where one rank's parameter is not finite."""
    chunks = tiny.model()
    refuse_nonfinite_parameters(7, chunks)
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(chunks[0].parameters())[0, 0] = NAN
    try:
        refuse_nonfinite_parameters(7, chunks)
    except TrainingError as error:
        return str(error)
    return ""


def flag_of_one_rank() -> list[bool]:
    """What every rank reads where the last one raises the flag in the second of three steps."""
    flag = SharedFlag()
    return [flag.soon(step == 2 and dist.get_rank() == dist.get_world_size() - 1) for step in (1, 2, 3)]


def gradients_of(**settings: Any) -> dict[str, torch.Tensor]:
    """The gradients of one step of the tiny model, by name."""
    chunks = tiny.model(distributed=False, **settings)
    optimizer: Any = None
    for chunk in chunks:
        chunk.zero_grad_buffer()
    prepare(chunks, optimizer)
    forward_backward(chunks, [tiny.batch(range(4)), tiny.batch(range(4, 8))], forward_only=False)
    return {name: parameter.main_grad.clone() for name, parameter in chunks[0].named_parameters()}


def recomputed() -> dict[str, float]:
    """The largest difference of gradients with each kind of recomputation to those without."""
    kinds: dict[str, dict[str, Any]] = {
        "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    }
    plain = gradients_of()
    found = {}
    for kind, settings in kinds.items():
        others = gradients_of(**settings)
        found[kind] = max(float((others[name] - gradient).abs().max()) for name, gradient in plain.items())
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    return found


def half_precision(run_dir: str) -> dict[str, Any]:
    """FP16: a scale that overflows at first, and a fixed one; each step's metrics and parameters' sum."""
    found = {}
    # Gradients overflow until it has halved often enough.
    growing = {"initial_loss_scale": 2.0**14, "hysteresis": 1, "loss_scale_window": 3}
    stuck = {"initial_loss_scale": 2.0**40, "min_loss_scale": 2.0**39, "hysteresis": 1}
    for name, optimizer, steps in (("growing", growing, 12), ("fixed", {"loss_scale": 4.0}, 12), ("stuck", stuck, 4)):
        recorder, prints = tiny.Recorder(), Prints()
        config = tiny.config(f"{run_dir}/{name}", steps=steps, optimizer=optimizer, save_at_end=False)
        trainer = tiny.trainer(config, callbacks=[recorder, prints], dtype="float16")
        try:
            trainer.fit()
            error = ""
        except TrainingError as failure:
            error = str(failure)
        found[name] = {"error": error, "steps": recorder.steps, "sums": prints.sums}
    return found


def overlapped(run_dir: str) -> list[dict[str, Any]]:
    """The same run with and without overlap of sums and gathers."""
    found = []
    for overlap in (False, True):
        recorder = tiny.Recorder()
        config = tiny.config(f"{run_dir}/{overlap}", steps=5, save_every=2, eval_every=2, eval_at_start=True)
        trainer = tiny.trainer(config, callbacks=[recorder], overlap=overlap)
        trainer.fit()
        found.append(
            {
                "losses": [step["train/loss"] for step in recorder.steps],
                "validation": trainer.validation_losses,
                "parameters": parameters(trainer.chunks),
                "settings": (trainer.chunks[0].ddp_config.overlap_param_gather, trainer.chunks[0].ddp_config.overlap_grad_reduce),
            }
        )
    return found


class Forgetful(Callback):
    """Gives the validations 1.0, 0.5, 0.7, 0.9, ... in place of the model's."""

    LOSSES = (1.0, 0.5, 0.7, 0.9, 0.8)

    def after_validation(self, trainer: Trainer, loss: float) -> None:
        count = len(trainer.validation_losses)
        trainer.validation_losses[-1] = (trainer.step, self.LOSSES[count - 1])


def kept(run_dir: str) -> dict[str, list[str]]:
    """Which of five saved steps stay under each setting."""
    found = {}
    for name, settings in {
        "last": {"keep_last": 2},
        "best": {"keep_best": 1},
        "both": {"keep_last": 2, "keep_best": 2},
        "all": {},
    }.items():
        config = tiny.config(f"{run_dir}/{name}", steps=5, save_every=1, **settings)
        tiny.trainer(config, callbacks=[Forgetful()]).fit()
        found[name] = sorted(entry.name for entry in Path(run_dir, name, "checkpoints").glob("step_*"))
    return found
