"""Bad steps: a loss or gradient that is not a number, a spike; each under each policy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer

CASES = "tests.support.loop"


@pytest.fixture(scope="module")
def runs(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The third of six steps is bad, on two ranks; what rank 0 saw."""
    folder = str(tmp_path_factory.mktemp("policies"))
    both = ranks.run(f"{CASES}:policies", topology=Topology(dp=2), kwargs={"run_dir": folder}, timeout=400)
    for name, run in both[0].items():
        assert run["steps"] == both[1][name]["steps"] and run["error"] == both[1][name]["error"]
    first: dict[str, dict[str, Any]] = both[0]
    return first


@pytest.mark.parametrize("name", ["skip", "skip_gradient"])
def test_fault_29_a_skipped_step_changes_nothing(runs: dict[str, dict[str, Any]], name: str) -> None:
    run = runs[name]
    assert not run["error"] and run["steps"] == [1, 2, 3, 4, 5, 6]
    assert run["sums"][2] == run["sums"][1] and len(set(run["sums"])) == 5
    assert all(math.isfinite(number) for number in run["sums"])
    assert run["last"]["train/skipped_steps"] == 1
    assert any("of step 3 is nan: the step is skipped" in line for line in run["said"])
    # The batch is not seen again.
    assert run["batches"] == [start for start in range(0, 48, 4)]


def test_fault_29_a_rollback_goes_on_from_the_last_save_with_the_next_batches(runs: dict[str, dict[str, Any]]) -> None:
    run, without = runs["rollback"], runs["without"]
    assert not run["error"] and run["steps"] == [1, 2, 2, 3, 4, 5, 6]
    assert run["batches"] == list(range(0, 56, 4)) and run["consumed"] == 56
    assert any("the loss of step 3 is nan: back to the last saved step" in line for line in run["said"])
    # As if the data had never held that batch.
    assert [loss for loss in run["losses"] if loss is not None] == without["losses"]
    assert all(torch.equal(tensor, without["parameters"][name]) for name, tensor in run["parameters"].items())


def test_fault_29_a_rollback_without_a_save_says_so(runs: dict[str, dict[str, Any]]) -> None:
    assert "no step was saved yet; set checkpoint.save_every" in runs["nothing_saved"]["error"]
    assert runs["nothing_saved"]["saved"] == []


def test_a_spike_is_what_the_policy_makes_of_it(runs: dict[str, dict[str, Any]]) -> None:
    assert "the loss of step 3 is" in runs["stop_spike"]["error"] and "more than 3 x the mean" in runs["stop_spike"]["error"]
    assert runs["stop_spike"]["saved"] == ["step_2"]
    skipped = runs["skip_spike"]
    assert not skipped["error"] and skipped["sums"][2] == skipped["sums"][1]
    ignored = runs["ignore_spike"]
    assert not ignored["error"] and ignored["losses"][2] > 3 * ignored["losses"][1] and ignored["sums"][2] != ignored["sums"][1]


def test_the_limit_stops_a_run_that_only_skips(runs: dict[str, dict[str, Any]]) -> None:
    assert "bad step number 1, and policy.limit=0 allows no more" in runs["limit"]["error"]


def test_judgements(ranks: RankServer) -> None:
    """A spike is above twice the mean of the last three good losses; bad ones don't count for the mean."""
    (said,) = ranks.run(f"{CASES}:judged")
    *actions, error, recent = said
    assert actions == ["go", "go", "go", "rollback", "go", "skip", "go", "skip"]
    assert "the loss of step 9 is nan; it is bad step number 4" in error
    assert recent == [2.0, 8.0, 3.0]


def test_a_parameter_that_is_not_finite_is_not_saved(ranks: RankServer) -> None:
    errors = ranks.run(f"{CASES}:parameter_that_is_not_finite", topology=Topology(tp=2))
    assert errors[0] == errors[1] and "parameters are not finite after step 7, so it is not saved" in errors[0]
