"""The step itself: recomputation, FP16's loss scale, overlap with communication; what is kept of the saves."""

from __future__ import annotations

from pathlib import Path

import torch

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer

CASES = "tests.support.loop"


def test_recomputation_gives_the_same_gradients(ranks: RankServer) -> None:
    (differences,) = ranks.run(f"{CASES}:recomputed")
    assert differences.keys() == {"uniform", "block", "core_attn", "mlp"}
    assert all(difference < 1e-6 for difference in differences.values()), differences


def test_fp16_skips_steps_that_overflow_and_finds_its_scale(ranks: RankServer, tmp_path: Path) -> None:
    (runs,) = ranks.run(f"{CASES}:half_precision", kwargs={"run_dir": str(tmp_path)}, timeout=300)
    growing = runs["growing"]
    assert not growing["error"]
    scales = [step["train/loss_scale"] for step in growing["steps"]]
    overflowed = ["train/grad_norm" not in step for step in growing["steps"]]
    assert overflowed[0] and not all(overflowed), scales
    for number in range(1, len(scales)):
        if overflowed[number]:
            assert scales[number] == scales[number - 1] / 2 and growing["sums"][number] == growing["sums"][number - 1]
        else:
            assert scales[number] in (scales[number - 1], scales[number - 1] * 2)
            assert growing["sums"][number] != growing["sums"][number - 1]
    assert growing["steps"][-1]["train/skipped_steps"] == sum(overflowed)

    fixed = runs["fixed"]["steps"]
    assert [step["train/loss_scale"] for step in fixed] == [4.0] * 12
    assert fixed[-1]["train/loss"] < fixed[0]["train/loss"]
    # Gradients that overflow with the least scale are a fault, not a reason to skip steps for ever.
    assert "the gradient norm of step 2 is inf" in runs["stuck"]["error"]


def test_overlap_changes_nothing(ranks: RankServer, tmp_path: Path) -> None:
    for plain, overlapped in ranks.run(
        f"{CASES}:overlapped", topology=Topology(dp=2), kwargs={"run_dir": str(tmp_path)}, timeout=300
    ):
        assert (plain["settings"], overlapped["settings"]) == ((False, False), (True, True))
        assert overlapped["losses"] == plain["losses"] and overlapped["validation"] == plain["validation"]
        assert all(torch.equal(tensor, overlapped["parameters"][name]) for name, tensor in plain["parameters"].items())


def test_a_flag_of_one_rank_is_everyones(ranks: RankServer) -> None:
    assert ranks.run(f"{CASES}:flag_of_one_rank", topology=Topology(dp=2)) == [[False, True, False]] * 2


def test_the_last_and_the_best_saves_are_kept(ranks: RankServer, tmp_path: Path) -> None:
    (kept,) = ranks.run(f"{CASES}:kept", kwargs={"run_dir": str(tmp_path)}, timeout=300)
    # Validation losses of the steps: 1.0, 0.5, 0.7, 0.9, 0.8. Without keep_best only the last step is validated.
    assert kept["last"] == ["step_4", "step_5"]
    assert kept["best"] == ["step_2", "step_5"]
    assert kept["both"] == ["step_2", "step_3", "step_4", "step_5"]
    assert kept["all"] == ["step_1", "step_2", "step_3", "step_4", "step_5"]
