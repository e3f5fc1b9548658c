"""Freezing by Hugging Face and native names: frozen bits stay, the rest is trained, and half a parameter is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from megabridge.parallel.topology import Topology
from megabridge.storage import metrics_file
from tests.support.models import TINY
from tests.support.rank_server import RankError, RankServer
from tests.support.recipe_runs import values

CASES = "tests.support.recipes"
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module")
def source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "source"
    ranks.run(f"{CASES}:make_source", kwargs={"folder": str(folder)})
    return folder


def trained(ranks: RankServer, run_dir: Path, source: Path, freeze: list[str], topology: Topology, **provider: Any) -> set[str]:
    """Runs two steps; returns the names of the exported tensors whose bits have changed."""
    config = values(run_dir, source, topology, recipe={"steps": 2}, model={"provider": provider})
    config["optimizer"] = {"lr": 1e-2, "freeze": freeze}
    config["callbacks"] = {"hf_export": {"_target_": "megabridge.callbacks.hf_export.HFExport"}}
    ranks.run(f"{CASES}:recipe", topology=topology, kwargs={"name": "finetune", "values": config})
    before, after = (load_file(folder / "model.safetensors") for folder in (source, run_dir / "checkpoints/step_2/hf"))
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if (after[name] != tensor).any()}


CHOICES: dict[str, tuple[list[str], Topology, dict[str, Any], Any]] = {
    "by_hf_name": (["model.layers.0.*", "*embed_tokens*"], Topology(), {}, lambda n: "layers.0." not in n and "embed" not in n),
    "by_native_name": (
        ["*linear_fc1*", "*norm*"],
        Topology(tp=2),
        {},
        lambda n: "gate" not in n and "up_proj" not in n and "norm" not in n,
    ),
    "all_but": (["*", "!model.layers.1.mlp.*"], Topology(), {}, lambda n: "layers.1.mlp" in n),
    # The first stage holds nothing that is trained; a recomputed first block is given nothing that asks for a gradient.
    "a_whole_stage": (["*", "!*layers.2.*"], Topology(pp=2), {}, lambda n: "layers.2." in n),
    "recomputed": (["*embed_tokens*", "*lm_head*"], Topology(), FULL, lambda n: "embed" not in n and "lm_head" not in n),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_frozen_keeps_its_bits_and_all_else_moves(ranks: RankServer, tmp_path: Path, source: Path, choice: str) -> None:
    patterns, topology, provider, is_trained = CHOICES[choice]
    changed = trained(ranks, tmp_path, source, patterns, topology, **provider)
    names = load_file(source / "model.safetensors").keys()
    expected = {name for name in names if is_trained(name)}
    assert expected and changed == expected


def test_frozen_parameters_have_no_gradient_of_their_own_to_compute(ranks: RankServer, tmp_path: Path, source: Path) -> None:
    """TFLOP/s counts 4 operations a weight in place of 6 for what is frozen."""
    rates = []
    for number, freeze in enumerate((["*norm*"], ["*", "!*norm*"])):
        trained(ranks, tmp_path / str(number), source, freeze, Topology())
        (*_, row) = [row for row in metrics_file.read(tmp_path / str(number)) if "train/tflops_per_device" in row]
        rates.append(row["train/tflops_per_device"] * row["train/step_seconds"])
    attention = 3 * 3 * TINY["num_attention_heads"] * 4 * TINY["head_dim"] * 16 / 2 * 4 * 16 / 1e12
    assert (rates[1] - attention) / (rates[0] - attention) == pytest.approx(4 / 6)


def test_a_run_with_frozen_layers_goes_on_under_another_layout(ranks: RankServer, tmp_path: Path, source: Path) -> None:
    """One stage holds nothing that is trained, and so no optimizer state; then there is one stage only."""

    def losses(run_dir: Path, topology: Topology, steps: int, resume: str) -> list[float]:
        config = values(run_dir, source, topology, recipe={"steps": steps}, checkpoint={"resume": resume, "hf": False})
        config["optimizer"] = {"lr": 1e-2, "freeze": ["*", "!*layers.2.*"]}
        config["callbacks"] = {}
        ranks.run(f"{CASES}:recipe", topology=topology, kwargs={"name": "finetune", "values": config})
        return [row["train/loss"] for row in metrics_file.read(run_dir) if "train/loss" in row]

    whole = losses(tmp_path / "whole", Topology(pp=2), 4, "none")
    losses(tmp_path / "same", Topology(pp=2), 2, "none")
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    assert losses(tmp_path / "same", Topology(pp=2), 4, "auto") == whole
    assert losses(tmp_path / "other", Topology(tp=2), 4, "auto") == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            ["*q_proj*"],
            r"decoder.layers.0.self_attention.linear_qkv.weight is one parameter of .*q_proj.weight and .*k_proj.weight",
        ),
        (["*.attn.*", "*norm*"], r"'\*.attn.\*' matches no Hugging Face and no native name"),
        (["*"], "nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused(ranks: RankServer, tmp_path: Path, source: Path, freeze: list[str], message: str) -> None:
    with pytest.raises(RankError, match=message):
        trained(ranks, tmp_path, source, freeze, Topology(pp=2))
