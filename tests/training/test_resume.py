"""A run that is cut in two ends where the whole run ends, bit for bit, and may change its layout in between."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megabridge.parallel.topology import Topology
from tests.support.covering import further
from tests.support.rank_server import RankError, RankServer
from tests.support.resumed import assert_equal, trained, whole_tensors, without_padding


@pytest.mark.parametrize("topology", [Topology(dp=2), Topology(pp=2), *further(Topology(), Topology(tp=2))], ids=str)
def test_fault_27_two_halves_equal_the_whole(ranks: RankServer, tmp_path: Path, topology: Topology) -> None:
    whole = trained(ranks, topology, tmp_path / "whole", steps=6, deterministic=True)
    first = trained(ranks, topology, tmp_path / "halves", steps=6, stop_after=3, deterministic=True)
    second = trained(ranks, topology, tmp_path / "halves", steps=6, resume="auto", deterministic=True)

    for everything, before, after in zip(whole, first, second, strict=True):
        assert before["step"] == 3
        assert before["batches"] + after["batches"] == everything["batches"]
        assert before["losses"] + after["losses"] == everything["losses"]
        assert before["norms"] + after["norms"] == everything["norms"]
        assert before["rates"] + after["rates"] == everything["rates"]
        assert after["validation"] == everything["validation"]
        assert_equal(after["parameters"], everything["parameters"])
        assert_equal(after["optimizer"], everything["optimizer"])
        assert int(after["optimizer"]["step"]) == 6


def test_dropout_continues_with_the_same_random_numbers(ranks: RankServer, tmp_path: Path) -> None:
    options = {"hidden_dropout": 0.2}
    whole = trained(ranks, Topology(), tmp_path / "whole", steps=4, options=options)
    trained(ranks, Topology(), tmp_path / "halves", steps=4, stop_after=2, options=options)
    second = trained(ranks, Topology(), tmp_path / "halves", steps=4, resume="auto", options=options)
    assert second[0]["losses"] == whole[0]["losses"][2:]
    dry = trained(ranks, Topology(), tmp_path / "dry", steps=4)
    assert dry[0]["losses"] != whole[0]["losses"]


@pytest.mark.parametrize(
    "other", [Topology(pp=2, vpp=2), Topology(dp=2), *further(Topology(), Topology(pp=2), Topology(tp=2, pp=2))], ids=str
)
def test_another_layout_reads_the_same_bits_and_goes_on(ranks: RankServer, tmp_path: Path, other: Topology) -> None:
    written = trained(ranks, Topology(tp=2), tmp_path / "run", steps=6, stop_after=3)
    shutil.copytree(tmp_path / "run", tmp_path / "other")

    read = ranks.run("tests.support.training:loaded", topology=other, kwargs={"folder": str(tmp_path / "other")})
    for what in ("parameters", "optimizer"):
        assert_equal(without_padding(whole_tensors(read, what)), without_padding(whole_tensors(written, what)))

    straight = trained(ranks, Topology(tp=2), tmp_path / "run", steps=6, resume="auto")
    moved = trained(ranks, other, tmp_path / "other", steps=6, resume="auto")
    assert moved[0]["losses"] == pytest.approx(straight[0]["losses"], abs=1e-5)
    assert moved[0]["norms"] == pytest.approx(straight[0]["norms"], rel=1e-4)


def test_state_of_an_optimizer_that_is_not_distributed_comes_back(ranks: RankServer, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        options = {"distributed": False, "dtype": dtype}
        whole = trained(ranks, Topology(), tmp_path / dtype / "whole", steps=4, options=options)
        trained(ranks, Topology(), tmp_path / dtype / "halves", steps=4, stop_after=2, options=options)
        second = trained(ranks, Topology(), tmp_path / dtype / "halves", steps=4, resume="auto", options=options)
        assert second[0]["losses"] == whole[0]["losses"][2:]
        assert_equal(second[0]["parameters"], whole[0]["parameters"])
        assert_equal(second[0]["optimizer"], whole[0]["optimizer"])


def test_bfloat16_keeps_its_float32_masters(ranks: RankServer, tmp_path: Path) -> None:
    options = {"dtype": "bfloat16"}
    whole = trained(ranks, Topology(dp=2), tmp_path / "whole", steps=4, options=options)
    trained(ranks, Topology(dp=2), tmp_path / "halves", steps=4, stop_after=2, options=options)
    second = trained(ranks, Topology(dp=2), tmp_path / "halves", steps=4, resume="auto", options=options)
    assert second[0]["losses"] == whole[0]["losses"][2:]
    assert_equal(second[0]["optimizer"], whole[0]["optimizer"])


def test_fault_28_other_data_is_refused_or_accepted_and_another_rate_is_taken(ranks: RankServer, tmp_path: Path) -> None:
    trained(ranks, Topology(), tmp_path, steps=2)
    with pytest.raises(RankError, match=r"recipe.global_batch_size: 8 -> 4"):
        trained(ranks, Topology(), tmp_path, steps=4, resume="auto", global_batch_size=4)
    with pytest.raises(RankError, match=r"checkpoint.accept_changes=\['optimizer.lr'\] must be of seed, recipe.global_batch_size"):
        trained(ranks, Topology(), tmp_path, steps=4, resume="auto", accept_changes=["optimizer.lr"])

    settings = {"global_batch_size": 4, "accept_changes": ["recipe.global_batch_size"], "lr": 5e-3}
    result = trained(ranks, Topology(dp=2), tmp_path, steps=4, resume="auto", **settings)
    assert result[0]["rates"] == [5e-3, 5e-3]
    assert result[0]["batches"] == [16, 20] and result[1]["batches"] == [18, 22]
    (said,) = [line for line in result[0]["said"] if line.startswith("resumed with changed settings:")]
    assert set(said.split("\n  ")[1:]) == {
        "recipe.global_batch_size: 8 -> 4",
        "optimizer.lr: 0.01 -> 0.005",
        "recipe.steps: 2 -> 4",
        "parallel: single -> dp2",
    }


def test_every_setting_that_changes_is_said(ranks: RankServer) -> None:
    """Whatever the schema has: each leaf is changed in turn."""
    (found,) = ranks.run("tests.support.training:changed_settings", topology=Topology())
    assert found["silent"] == ["checkpoint.accept_changes", "checkpoint.resume"]
    assert found["refused"] >= {
        "seed",
        "recipe.seq_length",
        "recipe.global_batch_size",
        "data.path",
        "model.hf.hidden_size",
        "inputs.rows",
    }
    assert found["said"] >= {"parallel.etp", "recipe.micro_batch_size", "model.provider.hidden_dropout", "model.path", "run_dir"}
    assert "hunter2" not in found["kept"] and "from the environment" not in found["kept"]
    assert found["secret"] and found["of the environment"]


def test_a_run_does_not_run_over_anothers_steps(ranks: RankServer, tmp_path: Path) -> None:
    trained(ranks, Topology(), tmp_path, steps=2)
    with pytest.raises(RankError, match=r"step_2 that is already in .*checkpoint.resume=auto"):
        trained(ranks, Topology(), tmp_path, steps=2)


def test_a_step_may_be_a_link_and_what_is_none_is_said(ranks: RankServer, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run/checkpoints"
    trained(ranks, Topology(), tmp_path / "run", steps=2)
    (checkpoints / "step_2").rename(tmp_path / "elsewhere")
    (checkpoints / "step_2").symlink_to(tmp_path / "elsewhere")
    (checkpoints / "step_4").symlink_to("nowhere")
    with pytest.raises(
        RankError, match=r"(?s)must have room for the steps .* after step 2; .*step_4 is a link that can't be read as"
    ):
        trained(ranks, Topology(), tmp_path / "run", steps=4, resume="auto", keep_last=1)
    (checkpoints / "step_4").rename(checkpoints / "step_9")
    result = trained(ranks, Topology(), tmp_path / "run", steps=4, resume="auto", keep_last=1)
    assert len(result[0]["losses"]) == 2
    assert any(line.startswith("step_2 is a link, which is removed; what it leads to is kept") for line in result[0]["said"])
    again = trained(ranks, Topology(), tmp_path / "run", steps=6, resume="auto", keep_last=1)
    assert len(again[0]["losses"]) == 2 and (tmp_path / "elsewhere/native/metadata.json").exists()
    assert sorted(entry.name for entry in checkpoints.glob("step_*")) == ["step_6", "step_9"]


def test_a_step_under_another_steps_name_is_refused(ranks: RankServer, tmp_path: Path) -> None:
    """Else what is trained from it would count as older than it, and be what `keep_last` removes."""
    trained(ranks, Topology(), tmp_path, steps=2)
    (tmp_path / "checkpoints/step_2").rename(tmp_path / "checkpoints/step_9")
    kwargs = {"steps": 4, "save_every": 1, "keep_last": 1}
    for resume in ("auto", str(tmp_path / "checkpoints/step_9")):
        with pytest.raises(RankError, match="step_9/native must hold the step that its folder is named after, but holds step 2"):
            trained(ranks, Topology(), tmp_path, **kwargs, resume=resume)
    (tmp_path / "checkpoints/step_9").rename(tmp_path / "checkpoints/step_2")
    assert trained(ranks, Topology(), tmp_path, **kwargs, resume="auto")[0]["step"] == 4
    assert [entry.name for entry in (tmp_path / "checkpoints").glob("step_*")] == ["step_4"]


def test_a_full_disk_ends_no_training_and_takes_no_save(ranks: RankServer, tmp_path: Path) -> None:
    (found,) = ranks.run("tests.support.training:without_room", topology=Topology(), kwargs={"run_dir": str(tmp_path)})
    assert [line["step"] for line in found["metrics"] if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert found["printed"].count("can't be written (File too large)") == 1 and "nothing is missing" in found["printed"]
    assert found["source"] == "config.json before" and "source can't be written (File too large); free space" in found["refused"]
    assert "source must be a folder of this run's own, not a link" in found["linked"]
    assert "step_6/native can't be written: " in found["failed"]
    assert [entry.name for entry in (tmp_path / "checkpoints").glob("*/native")] == ["native"]
    assert trained(ranks, Topology(), tmp_path, steps=6, resume="auto")[0]["step"] == 6


def test_resume_from_a_folder(ranks: RankServer, tmp_path: Path) -> None:
    whole = trained(ranks, Topology(), tmp_path / "whole", steps=4, save_every=2)
    second = trained(ranks, Topology(), tmp_path / "other", steps=4, resume=str(tmp_path / "whole/checkpoints/step_2"))
    assert second[0]["losses"] == whole[0]["losses"][2:]
    with pytest.raises(RankError, match="there is no complete native checkpoint there"):
        trained(ranks, Topology(), tmp_path / "third", steps=4, resume=str(tmp_path / "nothing"))
