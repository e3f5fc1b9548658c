"""The loss weighs tokens alike, however they are spread over micro-batches and ranks; and it goes down."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankError, RankServer

RUN = "tests.support.training:run"


def trained(ranks: RankServer, topology: Topology, folder: Path, **kwargs: Any) -> dict[str, Any]:
    result: dict[str, Any] = ranks.run(RUN, topology=topology, kwargs={"run_dir": str(folder), **kwargs})[0]
    return result


@pytest.fixture(scope="module")
def single(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One micro-batch of 8 sequences a step."""
    return trained(ranks, Topology(), tmp_path_factory.mktemp("single"), steps=4, micro_batch_size=8)


@pytest.mark.parametrize(
    ("topology", "micro_batch_size"),
    [
        (Topology(), 1),
        (Topology(), 4),
        (Topology(dp=2), 1),
        (Topology(dp=2), 4),
        (Topology(tp=2), 2),
        (Topology(pp=2), 2),
        (Topology(pp=2, vpp=2), 2),
        (Topology(tp=2, pp=2, vpp=2), 2),
    ],
    ids=str,
)
def test_loss_and_gradient_depend_on_the_batch_only(
    ranks: RankServer, tmp_path: Path, single: dict[str, Any], topology: Topology, micro_batch_size: int
) -> None:
    options = {"sequence_parallel": topology.tp > 1}
    result = trained(ranks, topology, tmp_path, steps=4, micro_batch_size=micro_batch_size, options=options)
    assert result["losses"] == pytest.approx(single["losses"], abs=1e-4)
    assert result["norms"] == pytest.approx(single["norms"], rel=1e-4)


@pytest.mark.parametrize(
    ("topology", "options"),
    [
        (Topology(), {}),
        (Topology(dp=2), {"overlap": True}),
        (Topology(tp=2), {"sequence_parallel": True}),
        (Topology(pp=2, vpp=2), {"share_embeddings_and_output_weights": False}),
    ],
    ids=str,
)
def test_weight_gradients_may_be_added_in_place(
    ranks: RankServer, tmp_path: Path, topology: Topology, options: dict[str, Any]
) -> None:
    norms = []
    for in_place in (False, True):
        more = {"gradient_accumulation_fusion": in_place, **options}
        found = trained(ranks, topology, tmp_path / str(in_place), steps=3, micro_batch_size=2, options=more)
        norms.append(found["norms"])
        assert found["added_in_place"] == in_place
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # may be summed in another order


def test_loss_is_the_mean_over_unmasked_tokens(ranks: RankServer) -> None:
    results = ranks.run("tests.support.training:loss_by_hand", topology=Topology(dp=2))
    for trained_loss, by_hand in results:
        assert trained_loss == pytest.approx(by_hand, abs=1e-6)


def test_validation_counts_tokens_not_batches(ranks: RankServer) -> None:
    for topology in (Topology(), Topology(dp=2), Topology(pp=2), Topology(pp=2, vpp=2)):
        for (loss, tokens), by_hand in ranks.run("tests.support.training:validation_by_hand", topology=topology):
            assert loss == pytest.approx(by_hand[0], abs=1e-5)
            assert tokens == by_hand[1]


def test_a_run_without_validation_data_has_no_validation_loss(ranks: RankServer, tmp_path: Path) -> None:
    kwargs = {"run_dir": str(tmp_path)}
    assert ranks.run("tests.support.training:without_validation", topology=Topology(dp=2), kwargs=kwargs) == [None, None]


def test_loss_goes_down(ranks: RankServer, tmp_path: Path) -> None:
    result = trained(ranks, Topology(), tmp_path, steps=40, eval_at_start=True, save_at_end=False)
    assert result["validation"] < 0.9 * result["validation_losses"][0][1]


def test_fault_29_loss_that_is_not_a_number_stops_the_run_and_is_not_saved(ranks: RankServer, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"the loss of step 3 is nan; nothing of it is saved"):
        ranks.run("tests.support.training:poisoned", topology=Topology(dp=2), kwargs={"run_dir": str(tmp_path)})
    assert [entry.name for entry in (tmp_path / "checkpoints").glob("step_*")] == ["step_2"]


@pytest.mark.parametrize(("saving", "step"), [(False, 3), (True, 2)])
def test_fault_05_sigterm_ends_the_step_saves_once_and_has_its_code(
    ranks: RankServer, tmp_path: Path, saving: bool, step: int
) -> None:
    kwargs = {"run_dir": str(tmp_path), "saving": saving}
    results = ranks.run("tests.support.training:interrupted", topology=Topology(dp=2), kwargs=kwargs)
    assert results == [(75, step), (75, step)]
    assert [entry.name for entry in (tmp_path / "checkpoints").glob("step_*")] == [f"step_{step}"]
    assert (tmp_path / f"checkpoints/step_{step}/native/metadata.json").is_file()


def test_fault_05_a_second_signal_ends_at_once_and_harms_nothing(ranks: RankServer, tmp_path: Path) -> None:
    whole = trained(ranks, Topology(), tmp_path / "whole", steps=6)
    with pytest.raises(RankError) as caught:
        ranks.run("tests.support.training:interrupted_twice", kwargs={"run_dir": str(tmp_path / "run")}, timeout=60)
    assert caught.value.failure["exit_code"] == -signal.SIGTERM
    assert not (tmp_path / "run/checkpoints/step_4/native").exists()
    rest = trained(ranks, Topology(), tmp_path / "run", steps=6, resume="auto")
    assert rest["losses"] == whole["losses"][2:] and not list((tmp_path / "run").rglob("*.partial"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch_size": 3}, "recipe.global_batch_size=3 must be a multiple of recipe.micro_batch_size x dp = 2 x 1"),
        ({"options": {"calculate_per_token_loss": False}}, "provider.calculate_per_token_loss=False"),
    ],
)
def test_settings_that_cannot_work_are_refused(ranks: RankServer, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RankError, match=message):
        trained(ranks, Topology(), tmp_path, steps=1, **settings)
