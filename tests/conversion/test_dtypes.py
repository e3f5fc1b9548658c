"""Checkpoints that mix dtypes: conversion keeps every tensor as it is, and what a model's parameters can't hold is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megabridge.hf.dtypes import holds, joined
from megabridge.parallel.topology import Topology
from tests.support.dtypes import SOURCES
from tests.support.payload import payload
from tests.support.rank_server import RankServer
from tests.support.recipe_runs import run, values

CASES = "tests.support.dtypes"


@pytest.fixture(scope="module")
def sources(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    ranks.run(f"{CASES}:sources", kwargs={"root": str(root)})
    return root


def is_as_it_was(source: Path, export: Path) -> bool:
    """Whether an export has the source's tensors, its config and its files of weights, all byte for byte."""
    files = sorted([*(path.name for path in source.glob("*.safetensors")), "config.json"])
    return (
        payload(source) == payload(export)
        and files == sorted([*(path.name for path in export.glob("*.safetensors")), "config.json"])
        and all((source / file).read_bytes() == (export / file).read_bytes() for file in files)
    )


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_every_tensor_keeps_its_dtype_and_its_bytes(
    ranks: RankServer, sources: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    kwargs = {"root": str(sources), "out": str(tmp_path), **layout}
    for said in ranks.run(f"{CASES}:there_and_back", world_size=2 if layout else 1, kwargs=kwargs):
        assert said == {name: {"lost": [], "printed": ""} for name in SOURCES}
    for name in SOURCES:
        assert is_as_it_was(sources / name, tmp_path / name / "hf"), name


def test_what_is_rounded_is_said(ranks: RankServer, sources: Path, tmp_path: Path) -> None:
    (said,) = ranks.run(f"{CASES}:rounding", world_size=1, kwargs={"root": str(sources), "out": str(tmp_path)})
    norms = sum("norm" in name for name in payload(sources / "norms"))
    whole = len(payload(sources / "norms"))
    assert said.pop("stored") == {"torch.float32"}
    for name, found in said.items():
        lost = {} if name in ("wide", "kept, run") else {"torch.float32 to torch.bfloat16": norms}
        assert found["casts"] == lost, name
        is_told = bool(lost) and name != "export, source"  # a bridge says a thing once
        told = f"{norms} from float32 to bfloat16 (model.layers.0.input_layernorm.weight, "
        assert (told in found["printed"]) == is_told, f"{name}: {found['printed']}"
    assert "what the native checkpoint has: 3 from float32 to bfloat16 (" in said["kept, run"]["printed"]
    assert f"; {norms} rounded" in said["import"]["report"] and "rounded" not in said["wide"]["report"]
    assert said["export, source"]["dtypes"] == {"bfloat16": whole - norms, "float32": norms}
    tied = whole - 1  # its copy is no tensor of the model's
    assert f"{tied} tensors ({tied - norms} bfloat16, {norms} float32), " in said["import"]["report"]
    assert said["export"]["dtypes"] == {"bfloat16": whole}
    assert is_as_it_was(sources / "norms", tmp_path / "wide"), "fp32 holds bf16 and fp32"
    for folder in ("source", "cast_hf", "cast_wide", "kept_hf", "ran_hf"):
        assert {dtype for dtype, _, _ in payload(tmp_path / folder).values()} == {"torch.bfloat16", "torch.float32"}, folder


def test_config_states_the_dtype_of_most_elements(ranks: RankServer, tmp_path: Path) -> None:
    ranks.run(f"{CASES}:mixed_parameters", world_size=1, kwargs={"root": str(tmp_path), "out": str(tmp_path / "out")})
    assert {dtype for dtype, _, _ in payload(tmp_path / "out/glm").values()} == {"torch.bfloat16", "torch.float32"}
    assert json.loads((tmp_path / "out/glm/config.json").read_text())["dtype"] == "bfloat16"
    ((said, integers),) = ranks.run(f"{CASES}:refused", world_size=1, kwargs={"root": str(tmp_path), "out": str(tmp_path)})
    assert "config.json's dtype" in said and "float64" in said and "give dtype=" in said
    assert integers.startswith("CheckpointError: weights must be floating-point numbers") and "model.norm.weight" in integers


def test_adapters_and_streams_say_it_too(ranks: RankServer, sources: Path, tmp_path: Path) -> None:
    (found,) = ranks.run(f"{CASES}:adapters", world_size=1, kwargs={"root": str(sources), "out": str(tmp_path)})
    assert found["dtypes"] == {"torch.bfloat16"}
    assert "the model's adapters can't hold what the files have: " in found["printed"] and "lora_A" in found["printed"]
    assert "exported with less precision than the source had: 9 from float32 to bfloat16" in found["printed"]


def test_recipes_keep_what_they_convert_and_say_what_training_rounds(ranks: RankServer, sources: Path, tmp_path: Path) -> None:
    def convert(mode: str, **groups: Any) -> None:
        config = values(tmp_path / mode, sources / "norms", Topology(tp=2), recipe={"steps": 0}, callbacks={}, **groups)
        run(ranks, "convert", Topology(tp=2), {**config, "conversion": {"mode": mode}})

    convert("roundtrip", model={"dtype": "bfloat16"})
    convert("import")
    convert("export", checkpoint={"resume": str(tmp_path / "import/native")})
    for mode in ("roundtrip", "export"):
        assert is_as_it_was(sources / "norms", tmp_path / mode / "hf"), mode
    resumed = values(
        tmp_path / "run", sources / "norms", Topology(), recipe={"steps": 1}, callbacks={},
        checkpoint={"resume": str(tmp_path / "import/native")}, model={"dtype": "bfloat16", "load_weights": False},
    )  # fmt: skip
    run(ranks, "finetune", Topology(), resumed)
    lines = (tmp_path / "run/lines.txt").read_text()
    assert "this run's parameters can't hold what the checkpoint has: 3 from float32 to bfloat16 (" in lines


def test_which_dtype_holds_which() -> None:
    floats = [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e8m0fnu,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ]
    for narrow in floats:
        for wide in floats:
            every = torch.arange(256, dtype=torch.uint8).view(narrow) if narrow.itemsize == 1 else None
            if narrow.itemsize == 2:
                every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(narrow)
            if every is not None:
                exact = every.to(torch.float64)
                finite = exact.isfinite()
                back = every.to(torch.float32).to(wide).to(torch.float64)
                assert holds(wide, narrow) == bool((back == exact)[finite].all()), f"{narrow} in {wide}"
    assert not holds(torch.float32, torch.float64) and not holds(torch.float32, torch.int64)
    assert (
        joined([torch.bfloat16, torch.float16]) is torch.float32 and joined([torch.float8_e5m2, torch.bfloat16]) is torch.bfloat16
    )
