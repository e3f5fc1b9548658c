"""The recipes from end to end: HF folder in, HF folder out, with reports, on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from megabridge.parallel.topology import Topology
from tests.support.models import TINY
from tests.support.rank_server import RankError, RankServer
from tests.support.recipe_runs import metrics, run, values


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2, pp=2)], ids=str)
def test_finetune_imports_trains_exports_and_reports(
    ranks: RankServer, tmp_path: Path, tiny_source: Path, topology: Topology
) -> None:
    config = values(
        tmp_path, tiny_source, topology, prompt="HELLO", recipe={"steps": 8}, checkpoint={"save_every": 4, "keep_last": 1}
    )
    losses = run(ranks, "finetune", topology, config)

    assert len(set(losses)) == 1 and losses[0] is not None
    first, last = (row["validation/loss"] for row in metrics(tmp_path, "validation/"))
    assert last == losses[0] < first
    assert len(metrics(tmp_path, "train/")) == 8
    (imported,) = [row for row in metrics(tmp_path, "import/") if "import/tensors" in row]
    assert imported["import/mismatched_tensors"] == 0
    tensors = len(load_file(tiny_source / "model.safetensors"))
    exports = metrics(tmp_path, "export/")
    assert [row["step"] for row in exports] == [4, 8]
    assert all(row["export/mismatched_tensors"] == 0 and row["export/tensors"] == tensors for row in exports)
    for row in metrics(tmp_path, "parity/"):
        assert row["parity/logits_max_abs_diff"] < 1e-4 and row["parity/logits_top1_agreement"] == 1
    assert [entry.name for entry in (tmp_path / "checkpoints").glob("step_*")] == ["step_8"]
    exported = tmp_path / "checkpoints/step_8/hf"
    assert json.loads((exported / "config.json").read_text()) == json.loads((tiny_source / "config.json").read_text())
    assert (exported / "tokenizer.json").is_file()

    lines = (tmp_path / "lines.txt").read_text().splitlines()
    for beginning in (
        "LlamaForCausalLM:",
        f"validation loss: {first:.4f} before, {last:.4f} after",
        f"import: {tensors} tensors",
        f"export of step 8: {tensors} tensors",
        "question: HELLO",
        "source model: ",
        "exported model: ",
    ):
        assert any(line.startswith(beginning) for line in lines), beginning


def test_epochs_are_counted_in_rows(ranks: RankServer, tmp_path: Path) -> None:
    """1.5 epochs of 10 rows, of which a step takes 4: the fourth step is the last one of the schedule, too."""
    length = {"steps": 99, "epochs": 1.5, "eval_at_start": False}
    config = values(tmp_path, None, Topology(), model={"hf": TINY, "load_weights": False}, recipe=length)
    config["data"] = {"_target_": "megabridge.data.synthetic.RandomTokens", "vocab_size": 61, "samples": 10}
    config["scheduler"] = {"name": "linear", "warmup_steps": 1}
    config |= {"callbacks": {}, "checkpoint": {"save_at_end": False}}
    run(ranks, "pretrain", Topology(), config)
    rates = [row["train/learning_rate"] for row in metrics(tmp_path, "train/")]
    assert rates == pytest.approx([0.005, 0.01, 0.01 * 2 / 3, 0.01 / 3])
    assert "recipe.epochs=1.5 of 10 rows: recipe.steps=4, each of 4 rows" in (tmp_path / "lines.txt").read_text()
    with pytest.raises(RankError, match=r"recipe\.epochs=1\.5 needs data whose rows are counted, and TinyData has no end"):
        run(ranks, "pretrain", Topology(), values(tmp_path / "endless", None, Topology(), model=config["model"], recipe=length))


def test_hooks_come_in_order(ranks: RankServer, tmp_path: Path, tiny_source: Path) -> None:
    run(ranks, "finetune", Topology(), values(tmp_path, tiny_source, Topology(), recipe={"steps": 1}))
    assert json.loads((tmp_path / "hooks.json").read_text()) == [
        "on_start",
        "on_import",
        "before_validation",
        "after_validation",
        "before_step",
        "after_step",
        "before_validation",
        "after_validation",
        "before_save",
        "on_save",
        "on_end",
    ]
    again = values(tmp_path, tiny_source, Topology(), recipe={"steps": 2, "eval_at_start": False}, checkpoint={"resume": "auto"})
    run(ranks, "finetune", Topology(), again)
    assert json.loads((tmp_path / "hooks.json").read_text())[:3] == ["on_start", "on_resume", "before_step"]


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_an_export_that_a_kill_left_unmade_is_made(ranks: RankServer, tmp_path: Path, tiny_source: Path, peft: str) -> None:
    name = "hf" if peft == "none" else "adapter"

    def config(run_dir: Path, **checkpoint: Any) -> dict[str, Any]:
        made = values(run_dir, tiny_source, Topology(dp=2), checkpoint={"save_every": 2, "keep_last": 1, **checkpoint})
        del made["callbacks"]["answer"]
        return made | {"peft": {"name": peft}}

    run(ranks, "finetune", Topology(dp=2), config(tmp_path / "whole"))
    cut = config(tmp_path / "cut")
    cut["callbacks"] = {"killed": {"_target_": "tests.support.recipes.Killed", "step": 4}, **cut["callbacks"]}
    with pytest.raises(RankError, match="SIGKILL"):
        run(ranks, "finetune", Topology(dp=2), cut)
    assert not (tmp_path / "cut/checkpoints/step_4" / name).exists() and (tmp_path / "cut/checkpoints/step_2").exists()

    run(ranks, "finetune", Topology(dp=2), config(tmp_path / "cut", resume="auto"))
    whole, cut_off = (sorted((tmp_path / which / "checkpoints/step_4" / name).iterdir()) for which in ("whole", "cut"))
    assert whole and [(file.name, file.read_bytes()) for file in cut_off if file.suffix == ".safetensors"] == [
        (file.name, file.read_bytes()) for file in whole if file.suffix == ".safetensors"
    ]
    assert [file.name for file in whole] == [file.name for file in cut_off]
    assert [entry.name for entry in (tmp_path / "cut/checkpoints").glob("step_*")] == ["step_4"]


def test_pretrain_starts_from_random_weights(ranks: RankServer, tmp_path: Path) -> None:
    shape = {**TINY, "vocab_size": 61}
    config = values(tmp_path, None, Topology(dp=2), model={"hf": shape, "load_weights": False})
    (loss, other) = run(ranks, "pretrain", Topology(dp=2), config)
    assert loss == other
    assert loss is not None and loss < metrics(tmp_path, "validation/")[0]["validation/loss"]
    assert not metrics(tmp_path, "import/")
    assert metrics(tmp_path, "parity/")[0]["parity/logits_max_abs_diff"] < 1e-4


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2, pp=2)], ids=str)
def test_convert_goes_round_and_through_a_native_checkpoint(
    ranks: RankServer, tmp_path: Path, tiny_source: Path, topology: Topology
) -> None:
    def convert(mode: str, **groups: Any) -> None:
        config = values(tmp_path / mode, tiny_source, topology, recipe={"steps": 0}, callbacks={}, **groups)
        run(ranks, "convert", topology, {**config, "conversion": {"mode": mode}})

    convert("roundtrip")
    convert("import")
    convert("export", checkpoint={"resume": str(tmp_path / "import/native")})
    expected = load_file(tiny_source / "model.safetensors")
    for mode in ("roundtrip", "export"):
        found = load_file(tmp_path / mode / "hf/model.safetensors")
        assert found.keys() == expected.keys()
        assert all((found[name] == tensor).all() for name, tensor in expected.items())
    with pytest.raises(RankError, match=r"checkpoint\.resume=<run>"):
        convert("export")


def test_plan_runs_in_one_process_whatever_the_layout(ranks: RankServer, tmp_path: Path) -> None:
    """As a user runs it; nothing is downloaded, and only one process runs the recipe."""
    command = "recipe=plan model=llama31_8b parallel=tp8pp2 parallel.dp=128 conversion.max_shard_size=1GB logger=local platform=cpu run_dir=run"
    run = ranks.program(command, cwd=tmp_path, environ={"HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr
    assert "291 tensors, 16060.5 MB: each element is written by exactly one of 2048 ranks" in run.stdout
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert (
        plan["world_size"] == 2048
        and plan["bytes"] == sum(share["written_bytes"] for share in plan["ranks"].values()) == 2 * 8_030_261_248
    )
    assert sorted(map(int, plan["ranks"])) == [*range(8), *range(1024, 1032)]
    assert all(share["held_bytes"] == share["fed_bytes"] >= share["written_bytes"] for share in plan["ranks"].values())
    assert {share["files"] for share in plan["ranks"].values()} != {1}


def test_a_setting_that_cannot_work_names_itself(ranks: RankServer, tmp_path: Path, tiny_source: Path) -> None:
    config = values(tmp_path, tiny_source, Topology(), model={"provider": {"hidden_sizes": 3}})
    with pytest.raises(RankError, match="hidden_size"):
        run(ranks, "finetune", Topology(), config)
