"""What the ranks of tests/training and tests/native/test_checkpoint.py run."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megabridge.config.schema import Config
from megabridge.errors import CheckpointError, ConfigError
from megabridge.loggers.jsonl import JsonLines
from megabridge.models.logits import gather_logits
from megabridge.native import checkpoint, optimizer_state
from megabridge.platform import determinism
from megabridge.storage import folders
from megabridge.storage.metrics_file import FILE_NAME
from megabridge.training import Callback, Trainer, build, resume
from megabridge.training.step import forward_backward, validate
from megabridge.training.stopping import Stopped
from tests.support import steady, tiny
from tests.support.limits import largest_file

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async


def run(
    run_dir: str,
    *,
    steps: int,
    options: dict[str, Any] | None = None,
    stop_after: int | None = None,
    deterministic: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Trains; returns each step's metrics, this rank's parameters and optimizer state, and the validation loss.

    `stop_after` ends the run at that step as SIGTERM would, with a save.
    """
    if deterministic:
        determinism.require()
    recorder = tiny.Recorder()
    callbacks = [recorder] if stop_after is None else [recorder, Interrupt(stop_after)]
    trainer = tiny.trainer(tiny.config(run_dir, steps=steps, **settings), callbacks=callbacks, **(options or {}))
    loss = None
    with contextlib.suppress(Stopped), steady.watched() as routed:
        loss = trainer.fit()
    return {
        "steady": all(routed),
        "validation_losses": trainer.validation_losses,
        "metrics": recorder.steps,
        "losses": [step["train/loss"] for step in recorder.steps],
        "norms": [step["train/grad_norm"] for step in recorder.steps],
        "rates": [step["train/learning_rate"] for step in recorder.steps],
        "validation": loss,
        "parameters": parameters(trainer.chunks),
        "optimizer": state(trainer.optimizer, trainer.chunks),
        "step": trainer.step,
        "batches": trainer.data.seen,
        "said": recorder.said,
        "added_in_place": any(vars(p).get("grad_added_to_main_grad") for chunk in trainer.chunks for p in chunk.parameters()),
    }


def parameters(chunks: list[Any]) -> dict[str, torch.Tensor]:
    """Copies of this rank's parameters by their place in the global tensors."""
    return {name: shard.data.detach().clone() for name, shard in tiny.shards(chunks).items()}


def state(optimizer: Any, chunks: list[Any]) -> dict[str, torch.Tensor]:
    """Optimizer state by place in the global tensors, gathered over dp, and the number of steps."""
    optimizer_state.seed(optimizer)
    model = {"model" if len(chunks) == 1 else f"model{i}": c.module.sharded_state_dict() for i, c in enumerate(chunks)}
    found = {"step": torch.tensor(optimizer_state.common(optimizer)["step"])}
    sharded = optimizer_state.sharded(optimizer, model, loading=False)
    tiny.apply_factories(sharded)
    for entry in tiny.nested_values(sharded):
        if isinstance(entry, tiny.ShardedTensor):
            found[f"{entry.key}{list(entry.global_offset)}"] = entry.data.detach().clone()
    return found


class Interrupt(Callback):
    """Sends SIGTERM to the last rank's own process before step `after` ends."""

    def __init__(self, after: int) -> None:
        self.after = after

    def before_step(self, trainer: Trainer) -> None:
        if trainer.step == self.after - 1 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class InterruptSave(Callback):
    """Sends SIGTERM to the last rank's own process while step 2 is saved."""

    def before_save(self, trainer: Trainer, step: int) -> None:
        if step == 2 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(run_dir: str, *, saving: bool = False) -> tuple[Any, int]:
    """The exit code and the step of a run that one rank's SIGTERM ends: in step 3, or while step 2 is saved."""
    config = tiny.config(run_dir, steps=100, save_every=2 if saving else None, log_every=50)
    trainer = tiny.trainer(config, callbacks=[InterruptSave() if saving else Interrupt(3)])
    try:
        trainer.fit()
    except SystemExit as stopped:
        return stopped.code, trainer.step
    raise AssertionError("the run went on")


def loaded(folder: str) -> dict[str, Any]:
    """Parameters and optimizer state as read from the newest step of a run."""
    trainer = tiny.trainer(tiny.config(folder, steps=100))
    source = folders.latest(Path(folder, "checkpoints"))
    assert source is not None
    checkpoint.load(source, trainer.chunks, optimizer=trainer.optimizer, scheduler=trainer.scheduler)
    return {"parameters": parameters(trainer.chunks), "optimizer": state(trainer.optimizer, trainer.chunks)}


class Poison(tiny.Samples):
    """Turns the model's parameters to NaN before the third step."""

    def __init__(self, chunks: list[Any]) -> None:
        super().__init__(2)
        self.chunks = chunks

    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[dict[str, torch.Tensor]]:
        batches = super().train_batches(consumed_samples, dp_rank=dp_rank, dp_size=dp_size)
        for count, batch in enumerate(batches):
            if count == 2 * 8 // (2 * dp_size):
                with torch.no_grad():
                    next(self.chunks[0].parameters()).fill_(float("nan"))
            yield batch


def poisoned(run_dir: str) -> None:
    """A run whose third loss is not a number."""
    trainer = tiny.trainer(tiny.config(run_dir, steps=6, save_every=1, keep_last=1))
    data: Any = Poison(trainer.chunks)
    trainer.data = data
    trainer.fit()


def loss_by_hand() -> tuple[float, float]:
    """The loss of four uneven micro-batches over dp2, and the same from one plain forward of all of them."""
    chunks = tiny.model()
    everything = [tiny.batch(range(start, start + 2)) for start in range(0, 8, 2)]
    totals = forward_backward(chunks, everything[dist.get_rank() :: 2], forward_only=True)
    return float(totals[0] / totals[1]), _by_hand(chunks, everything)[0]


def validation_by_hand() -> tuple[tuple[float, int], tuple[float, int]]:
    """Validation of three batches (an odd number for dp2 and for vpp), and the same from a model of one stage."""
    chunks = tiny.model()
    dp, size = tiny.parallel_state.get_data_parallel_rank(), tiny.parallel_state.get_data_parallel_world_size()
    everything = [tiny.batch(range(start, start + 2)) for start in range(0, 6, 2)]
    result = validate(chunks, everything[dp::size], micro_batch_size=2, seq_length=tiny.SEQUENCE)
    totals = [forward_backward(chunks, [one] * 2, forward_only=True) / 2 for one in everything]
    loss, count = (torch.stack(totals).sum(0) / size).tolist()
    return result, (loss / count, round(count))


def _by_hand(chunks: list[Any], batches: list[dict[str, torch.Tensor]]) -> tuple[float, int]:
    total, count = 0.0, 0
    for one in batches:
        with torch.no_grad():
            losses = chunks[0](one["tokens"], one["position_ids"], None, labels=one["labels"])
        total += float(losses[one["loss_mask"] > 0].double().sum())
        count += int(one["loss_mask"].sum())
    return total / count, count


def loaded_narrower(folder: str) -> None:
    """Loads into a model of other shapes."""
    _load_into(folder, hidden_size=24, kv_channels=8)


def loaded_untied(folder: str) -> None:
    """Loads into a model with an output layer of its own."""
    _load_into(folder, share_embeddings_and_output_weights=False)


def _load_into(folder: str, **settings: Any) -> None:
    trainer = tiny.trainer(tiny.config(folder, steps=100), **settings)
    source = folders.latest(Path(folder, "checkpoints"))
    assert source is not None
    checkpoint.load(source, trainer.chunks, optimizer=trainer.optimizer)


def weights_only(folder: str) -> bool:
    """Whether weights read alone are the step's, and the optimizer's masters equal them after."""
    source = folders.latest(Path(folder, "checkpoints"))
    assert source is not None
    whole = tiny.trainer(tiny.config(folder, steps=100))
    checkpoint.load(source, whole.chunks, optimizer=whole.optimizer)
    trainer = tiny.trainer(tiny.config(folder, steps=100), dtype="bfloat16")
    checkpoint.load_weights(source, trainer.chunks, optimizer=trainer.optimizer)
    expected = parameters(whole.chunks)
    equal = all(torch.equal(expected[name].bfloat16(), tensor) for name, tensor in parameters(trainer.chunks).items())
    masters = state(trainer.optimizer, trainer.chunks)
    prefix = "optimizer.state.param."
    return equal and all(torch.equal(masters[prefix + name], tensor.float()) for name, tensor in parameters(trainer.chunks).items())


def read_by_megatron(folder: str) -> bool:
    """Whether megatron-core's own loader finds the weights that ours finds."""
    source = folders.latest(Path(folder, "checkpoints"))
    assert source is not None
    ours = tiny.model()
    checkpoint.load_weights(source, ours)
    theirs = tiny.model()
    for parameter in theirs[0].parameters():
        parameter.data.zero_()
    wanted = {name: entry for name, entry in theirs[0].module.sharded_state_dict().items() if "_extra" not in name}
    read = dist_checkpointing.load({"model": wanted}, str(source))
    theirs[0].module.load_state_dict(read["model"], strict=False)
    expected = parameters(ours)
    return all(torch.equal(expected[name], tensor) for name, tensor in parameters(theirs).items())


def changed_settings() -> dict[str, Any]:
    """What a resume does for each setting that is changed alone: nothing, says it, or refuses."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text("optimizer: {name: '${oc.env:OPTIMIZER}'}")
        config = tiny.config(folder, steps=2)
        config.model.provider, config.model.hf = {"hidden_dropout": 0.5}, {"hidden_size": 4, "rope": {"theta": 1.0}}
        config.data, config.logger = {"path": "a"}, {"mine": {"api_key": "hunter2", "name": "b"}}
        config.optimizer.name = "from the environment"
        data: Any = tiny.Samples(2)
        data.digest = lambda: "3"
        before = resume.settings(config, None, data)
        outcomes: dict[str, list[str]] = {"silent": [], "said": [], "refused": []}
        for name in before:
            try:
                lines = resume.changes(before, {**before, name: "another"})
                assert lines == [] or lines[0].startswith(f"{name}: ")
                outcomes["said" if lines else "silent"].append(name)
            except ConfigError as error:
                assert f"\n  {name}: " in str(error)
                outcomes["refused"].append(name)
        config.logger["mine"]["api_key"] = "hunter3"
        is_secret = resume.settings(config, None, data) == before
        config.optimizer.name = "of the environment"
        changed = resume.changes(before, resume.settings(config, None, data))
        return {
            **{kind: set(names) for kind, names in outcomes.items()},
            "silent": sorted(outcomes["silent"]),
            "kept": str(before),
            "secret": is_secret,
            "of the environment": len(changed) == 1 and changed[0].startswith("optimizer.name: <redacted> "),
        }


class NoRoom(Callback):
    """The disk is full while steps 1 and 2 are taken, and from the save of step 6 on."""

    def __init__(self) -> None:
        self.limit = contextlib.ExitStack()

    def before_step(self, trainer: Trainer) -> None:
        if trainer.step == 0:
            self.limit.enter_context(largest_file((trainer.run_dir / FILE_NAME).stat().st_size + 30))
        if trainer.step == 2:
            self.limit.close()

    def before_save(self, trainer: Trainer, step: int) -> None:
        if step == 6:
            self.limit.enter_context(largest_file(2000))


def without_room(run_dir: str) -> dict[str, Any]:
    """A run whose disk is full for a while, and again in its last save; and a source that can't be written."""
    config = tiny.config(run_dir, steps=6, save_every=3, on_full_disk="fail")
    callback, printed = NoRoom(), io.StringIO()
    trainer = tiny.trainer(config, callbacks=[callback], loggers=[JsonLines()])
    failed = ""
    with contextlib.redirect_stdout(printed), callback.limit:
        try:
            trainer.fit()
        except CheckpointError as error:
            failed = str(error)
    config.model.hf = {"a": "x" * 4000}
    source = Path(run_dir, "source/config.json")
    source.parent.mkdir()
    source.write_text("config.json before")
    with largest_file(1000):
        refused = _refused_source(config)
    source.parent.rename(elsewhere := Path(run_dir, "elsewhere"))
    source.parent.symlink_to(elsewhere)
    linked = _refused_source(config)
    metrics = [json.loads(line) for line in Path(run_dir, FILE_NAME).read_text().splitlines()]
    said = {"printed": printed.getvalue(), "failed": failed, "refused": refused, "linked": linked}
    return {"metrics": metrics, "source": source.read_text(), **said}


def _refused_source(config: Config) -> str:
    try:
        build._write_source(config)
    except CheckpointError as error:
        return str(error)
    return ""


class FullDisk(Callback):
    """The disk is full on the last rank when step 2 is saved."""

    def before_save(self, trainer: Trainer, step: int) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            filesystem_async._write_item = _no_space


def _no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def save_without_space(run_dir: str) -> tuple[str, int]:
    """The error of a save that fails on one rank, and the step the trainer is at."""
    trainer = tiny.trainer(tiny.config(run_dir, steps=2, on_full_disk="fail"), callbacks=[FullDisk()])
    try:
        trainer.fit()
    except CheckpointError as error:
        return str(error), trainer.step
    raise AssertionError("the save succeeded")


class KillSelf(Callback):
    """Kills rank 0 by SIGKILL inside of the save of step 6."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def before_save(self, trainer: Trainer, step: int) -> None:
        if step != 6 or dist.get_rank() != 0:
            return
        if self.moment == "writing":
            filesystem_async._write_item = _die
        else:
            folders.commit = _die


def _die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_save(run_dir: str, moment: str) -> None:
    """Continues to step 6, whose save is not survived."""
    config = tiny.config(run_dir, steps=6, resume="auto", save_every=2)
    tiny.trainer(config, callbacks=[KillSelf(moment)]).fit()


def without_validation(run_dir: str) -> float | None:
    """What a run returns that has nothing to validate on."""
    trainer = tiny.trainer(tiny.config(run_dir, steps=1, save_at_end=False))
    data: Any = tiny.Samples(2, validation=0)
    trainer.data = data
    return trainer.fit()


class InterruptTwice(Callback):
    """Sends SIGTERM to rank 0's own process twice while step 4 is saved."""

    def before_save(self, trainer: Trainer, step: int) -> None:
        if step == 4 and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            filesystem_async._write_item = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)


def interrupted_twice(run_dir: str) -> None:
    """A run whose second signal comes in the middle of a file of step 4."""
    tiny.trainer(tiny.config(run_dir, steps=6, save_every=2), callbacks=[InterruptTwice()]).fit()


class Beyond(tiny.Samples):
    """The last data-parallel rank's second micro-batch for training, or its last one for validation, has a token of `number`; or
    can't be read, where `part` is nothing."""

    def __init__(self, number: int, *, part: str, is_validation: bool) -> None:
        super().__init__(2)
        self.number, self.part, self.is_validation = number, part, is_validation

    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[dict[str, torch.Tensor]]:
        for count, batch in enumerate(super().train_batches(consumed_samples, dp_rank=dp_rank, dp_size=dp_size)):
            yield self._spoilt(batch) if count == 1 and dp_rank == dp_size - 1 and not self.is_validation else batch

    def validation_batches(self, *, dp_rank: int, dp_size: int) -> list[dict[str, torch.Tensor]]:
        batches = super().validation_batches(dp_rank=dp_rank, dp_size=dp_size)
        return [*batches[:-1], self._spoilt(batches[-1])] if self.is_validation and dp_rank == dp_size - 1 else batches

    def _spoilt(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.part == "nothing":
            raise ConfigError(f"file {self.number} can't be read.")
        batch[self.part][1, 0] = self.number
        batch["loss_mask"][1, 0] = float(self.part == "labels" and self.number != -100)
        return batch


def beyond(run_dir: str, calls: list[dict[str, Any]]) -> list[str]:
    """What a run of two steps says of each kind of token that the model doesn't have; and `gather_logits`, last."""
    said = []
    trainer = tiny.trainer(tiny.config(run_dir, steps=2, save_at_end=False, log_every=100))
    for call in calls:
        data: Any = Beyond(**call)
        trainer.data, trainer.step = data, 0
        try:
            trainer.fit()
            said.append("")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    try:
        gather_logits(trainer.chunks, torch.tensor([[0, 1, tiny.VOCABULARY]]))
    except ConfigError as error:
        said.append(str(error))
    return said
