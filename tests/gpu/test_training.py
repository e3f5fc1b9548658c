"""Training on one CUDA device, in this process: who waits for the device, and when."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megabridge.config.optional_packages import is_installed

ON_GPU = torch.cuda.is_available() and os.environ["MEGABRIDGE_PLATFORM"] == "cuda"
pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device and make test-gpu")
WITH_TE = pytest.mark.skipif(not is_installed("transformer_engine"), reason="Transformer Engine is not installed")


@pytest.fixture(scope="module")
def single() -> Iterator[None]:
    from megabridge.parallel import process_groups
    from megabridge.parallel.topology import Topology

    process_groups.start(Topology())
    yield
    process_groups.stop()


def unobserved(run_dir: Path, *, log_every: int, **settings: Any) -> Any:
    """Eight steps, of which the fourth to seventh may not wait for the device; returns the trainer."""
    from megabridge.training import Callback
    from tests.support import tiny

    class Strict(Callback):
        def before_step(self, trainer: Any) -> None:
            # The first steps compile and allocate; the last is logged.
            torch.cuda.set_sync_debug_mode("error" if 3 <= trainer.step < 7 else "default")

        def after_step(self, trainer: Any, metrics: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

        def on_error(self, trainer: Any, error: BaseException) -> None:
            torch.cuda.set_sync_debug_mode("default")

    config = tiny.config(str(run_dir), steps=8, log_every=log_every, save_at_end=False, **settings)
    trainer = tiny.trainer(config, callbacks=[Strict()], dtype="bfloat16")
    trainer.fit()
    return trainer


def test_steps_that_are_not_logged_wait_for_nothing(single: None, tmp_path: Path) -> None:
    trainer = unobserved(tmp_path, log_every=100)
    assert trainer.step == 8 and trainer.validation_losses


def test_a_policy_that_looks_at_every_step_waits(single: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        unobserved(tmp_path, log_every=100, policy={"nonfinite": "skip"})


def test_a_flag_is_read_two_steps_later(single: None) -> None:
    from megabridge.training.flags import LAG, SharedFlag

    flag = SharedFlag()
    assert [flag.soon(step == 1) for step in range(5)] == [step == 1 + LAG for step in range(5)]
    assert flag.now(True) and not flag.now(False)


def test_adam_is_one_kernel_and_memory_is_the_devices(single: None, tmp_path: Path) -> None:
    from megabridge.native import optimizer_state

    trainer = unobserved(tmp_path, log_every=100)
    for part in optimizer_state.parts(trainer.optimizer):
        assert not isinstance(part.optimizer, torch.optim.AdamW) or part.optimizer.param_groups[0]["fused"]
    rates = trainer._clock.rates(trainer.step)
    assert 0 < rates["train/memory_gib"] < torch.cuda.get_device_properties(0).total_memory / 2**30


COMMAND = "model=tiny_llama platform=cuda logger=local recipe.steps=6 recipe.seq_length=64 optimizer.lr=5e-3"


def rows(run_dir: Path, *arguments: str) -> list[dict[str, Any]]:
    """What a run of the command logs."""
    from megabridge.storage import metrics_file

    command = [sys.executable, "-m", "megabridge.run", *COMMAND.split(), f"run_dir={run_dir}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return list(metrics_file.read(run_dir))


def test_adapters_learn_are_merged_and_evaluated(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Every statement is checked before it runs. " * 20)
    tasks = "{text:{kind:perplexity,path:" + str(text) + "}}"
    evaluate = ["callbacks=evaluate", f"callbacks.evaluate.tasks={tasks}", "callbacks.evaluate.on_error=fail"]
    found = rows(tmp_path / "run", "peft=lora", "peft.merge=true", *evaluate)
    losses = [row["validation/loss"] for row in found if "validation/loss" in row]
    assert losses[-1] < losses[0]
    assert any(name.startswith("evaluation/text/") for row in found for name in row)
    (folder,) = (tmp_path / "run/checkpoints").glob("step_*/hf")
    assert (folder / "model.safetensors").stat().st_size > 0


def resumed(run_dir: Path, *arguments: str) -> None:
    """Six steps, and the last three again from the checkpoint in the middle: the same losses, bit for bit."""

    def losses(*more: str) -> list[float]:
        given = ["model.dtype=bfloat16", "deterministic=true", *arguments, *more]
        return [row["train/loss"] for row in rows(run_dir, *given) if "train/loss" in row]

    whole = losses("checkpoint.save_every=3")
    shutil.rmtree(run_dir / "checkpoints/step_6")
    again = losses("checkpoint.resume=auto")
    assert whole[3:6] == again[-3:] and len(whole) == 6


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_resume_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    resumed(tmp_path / "run", f"peft={kind}")


FP8 = [pytest.param(recipe, id=recipe, marks=WITH_TE) for recipe in ("delayed", "tensorwise")]


@pytest.mark.parametrize("recipe", FP8)
def test_fp8_resumes_with_the_same_bits(tmp_path: Path, recipe: str) -> None:
    """Delayed scaling goes by the largest values of earlier steps, which the checkpoint has too."""
    resumed(tmp_path / "run", "backend=te", "+model.provider.fp8=hybrid", f"+model.provider.fp8_recipe={recipe}")


@WITH_TE
def test_fp8_learns_as_16_bits_do(tmp_path: Path) -> None:
    """Within 2 in 1,000, at a rate where the course of training doesn't hang on its noise: 1 in 10,000 apart was seen on an H200.

    At 5e-3, the rate of the other tests, another seed alone moves the loss by a tenth.
    """
    shape = ["model.dtype=bfloat16", "backend=te", "recipe.steps=60", "optimizer.lr=1e-3"]
    last = {}
    for recipe in ("none", "delayed", "tensorwise"):
        more = [] if recipe == "none" else ["+model.provider.fp8=hybrid", f"+model.provider.fp8_recipe={recipe}"]
        found = [row["validation/loss"] for row in rows(tmp_path / recipe, *shape, *more) if "validation/loss" in row]
        assert found[-1] < found[0]
        last[recipe] = found[-1]
    print(last)
    assert last["delayed"] == pytest.approx(last["none"], rel=2e-3) == last["tensorwise"]


def test_float16_finds_its_scale(tmp_path: Path) -> None:
    found = rows(
        tmp_path / "run", "model.dtype=float16", "optimizer.initial_loss_scale=1e9", "optimizer.hysteresis=1", "recipe.steps=40"
    )
    scales = [row["train/loss_scale"] for row in found if "train/loss_scale" in row]
    assert scales[-1] < 1e9
    losses = [row["validation/loss"] for row in found if "validation/loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("choice", ["", "peft=lora", "+model.provider.recompute_granularity=full"])
def test_memory_is_near_what_is_expected(tmp_path: Path, choice: str) -> None:
    """Within a fiftieth: kernels need some while they run, whatever the model's size, and the allocator rounds."""
    shape = [
        "model=llama32_1b",
        "model.hf.num_hidden_layers=4",
        "model.load_weights=false",
        "model.path=null",
        "model.tokenizer=bytes",
    ]
    batch = ["data=random_tokens", "recipe.seq_length=2048", "recipe.micro_batch_size=8", "recipe.global_batch_size=16"]
    more = (
        [] if "recompute" not in choice else ["+model.provider.recompute_method=uniform", "+model.provider.recompute_num_layers=1"]
    )
    given = [*shape, *batch, *([choice] if choice else []), *more]
    plan = tmp_path / "plan"
    rows(plan, "recipe=plan", *given)
    expected = sum(json.loads((plan / "plan.json").read_text())["memory"][0].values()) / 2**30
    run = rows(
        tmp_path / "run", *given, "callbacks=none", "checkpoint.save_at_end=false", "recipe.eval_at_start=false", "backend=torch"
    )
    held = max(row["train/memory_gib"] for row in run if "train/memory_gib" in row)
    print(f"{choice or 'all parameters'}: {held:.2f} GiB held, {expected:.2f} expected")
    assert held == pytest.approx(expected, rel=0.02)
