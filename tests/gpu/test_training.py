"""Training on one CUDA device, in this process: who waits for the device, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available() and os.environ["MEGABRIDGE_PLATFORM"] == "cuda"
pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device and make test-gpu")


@pytest.fixture(scope="module")
def single() -> Iterator[None]:
    from megabridge.platform import groups
    from megabridge.topology import Topology

    groups.start(Topology())
    yield
    groups.stop()


def unobserved(run_dir: Path, *, log_every: int, **settings: Any) -> Any:
    """Eight steps, of which the fourth to seventh may not wait for the device; returns the trainer."""
    from megabridge.training import Callback
    from tests.cases import tiny

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
    from megabridge.checkpoint import optimizer_state

    trainer = unobserved(tmp_path, log_every=100)
    for part in optimizer_state.parts(trainer.optimizer):
        assert not isinstance(part.optimizer, torch.optim.AdamW) or part.optimizer.param_groups[0]["fused"]
    rates = trainer._clock.rates(trainer.step)
    assert 0 < rates["train/memory_gib"] < torch.cuda.get_device_properties(0).total_memory / 2**30
